"""Own corpora: every kind of source, what is refused, and changes that are noticed."""

import builtins
import csv
import gzip
import io
import json
import os
import re
import shlex
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDataset, MMapIndexedDatasetBuilder
from fairseq_cli import preprocess
from sacremoses import MosesTokenizer
from subword_nmt.apply_bpe import BPE
from subword_nmt.learn_bpe import learn_bpe
from support.own_text import PAIRS, parallel, sides, write

from normexp.corpora import own_corpora, prepare
from normexp.corpora.adding import Added, add_corpus
from normexp.corpora.catalogue import load_catalogue
from normexp.corpora.own_request import Request
from normexp.errors import UserError
from normexp.paths import own_folder

CZECH, FRENCH = sides(PAIRS)


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of own corpora, for this test alone."""
    monkeypatch.setenv("NORMEXP_OWN_CORPORA", str(tmp_path / "own"))
    return tmp_path / "own"


def add(tmp_path: Path, *sources: Path, name: str = "mine", **options: Any) -> Added:
    return add_corpus(Request(name, list(sources), data_dir=tmp_path / "data", **options))


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def encoded(added: Added, split: str, side: str = "") -> list[list[str]]:
    """The tokens of every sentence, decoded by fairseq's own reader."""
    suffix = f".{'-'.join(added.prepared.manifest['languages'])}.{side}" if side else ""
    symbols = Dictionary.load(str(added.prepared.data_bin / f"dict{side and '.' + side}.txt"))
    data = MMapIndexedDataset(str(added.prepared.data_bin / f"{split}{suffix}"))
    return [[symbols[i] for i in data[n]] for n in range(len(data))]


def task_of(name: str = "mine") -> dict:
    return yaml.safe_load(own_corpora.task_file(name).read_text(encoding="utf-8"))


# --- kinds of sources


def test_two_aligned_files_are_split_tokenized_and_binarized(tmp_path: Path) -> None:
    added = add(tmp_path, *parallel(tmp_path))
    texts = {
        split: list(zip(*(lines(added.prepared.directory / "raw" / f"{split}.{code}")
                          for code in ("cs", "fr")), strict=True))
        for split in ("train", "valid", "test")
    }  # fmt: skip
    assert [len(texts[split]) for split in texts] == [288, 16, 16]
    # every pair is in one split, and in the order of the text
    assert sorted(chain.from_iterable(texts.values())) == sorted(PAIRS)
    for rows in texts.values():
        assert rows == sorted(rows, key=PAIRS.index)
    codes = BPE((added.prepared.directory / "text" / "bpe.codes").open(encoding="utf-8"))
    for side, column in (("cs", 0), ("fr", 1)):
        tokenizer = MosesTokenizer(side)
        for split, rows in texts.items():
            expected = [
                [*codes.process_line(" ".join(tokenizer.tokenize(row[column]))).split(), "</s>"]
                for row in rows
            ]
            assert encoded(added, split, side) == expected
    assert "held out of train: 16 lines for valid and 16 lines for test" in "\n".join(added.lines)


def test_held_out_pairs_occur_nowhere_else(tmp_path: Path) -> None:
    """Each sentence twice but those with "zítra"; the others must all stay in train."""
    repeated = [pair for pair in PAIRS for _ in range(1 if "zítra" in pair[0] else 2)]
    added = add(tmp_path, *parallel(tmp_path, repeated))
    train = set(lines(added.prepared.directory / "raw" / "train.cs"))
    for split in ("valid", "test"):
        for code in ("cs", "fr"):
            held = lines(added.prepared.directory / "raw" / f"{split}.{code}")
            assert len(held) == len(repeated) // 20
            assert all("zítra" in line or "demain" in line for line in held)
        assert not train & set(lines(added.prepared.directory / "raw" / f"{split}.cs"))


def test_held_out_pairs_do_not_depend_on_a_period_of_the_text(tmp_path: Path) -> None:
    """Every fourth sentence is about home: every n-th would be all of them or none."""
    added = add(tmp_path, *parallel(tmp_path))
    for split in ("valid", "test"):
        held = lines(added.prepared.directory / "raw" / f"{split}.cs")
        assert len({line.split()[-2] for line in held}) == 4


def test_doubtful_tokenization_is_said(tmp_path: Path) -> None:
    pairs = [(a, b.replace("'", "&apos;")) for a, b in PAIRS]
    said = "\n".join(add(tmp_path, *parallel(tmp_path, pairs), languages=["ja", "sr"]).lines)
    assert "ja is written without blanks" in said
    assert "sr is tokenized by the rules for en" in said
    assert "lines in sr have escapes" in said and "add --tokenized" in said


def test_splits_that_are_given_are_used(tmp_path: Path) -> None:
    files = {}
    for split, part in (("train", PAIRS[:250]), ("dev", PAIRS[250:280]), ("test", PAIRS[280:])):
        (tmp_path / split).mkdir()
        files[split] = parallel(tmp_path / split, part)
    added = add(tmp_path, *files["train"], valid=files["dev"], test=files["test"])
    for split, source in (("train", "train"), ("valid", "dev"), ("test", "test")):
        for path in files[source]:
            copied = added.prepared.directory / "raw" / f"{split}{path.suffix}"
            assert copied.read_bytes() == path.read_bytes()


def test_language_model_is_cut_from_the_end(tmp_path: Path) -> None:
    added = add(tmp_path, write(tmp_path / "novel.txt", CZECH), languages=["cs"])
    raw = [line for split in ("train", "valid", "test")
           for line in lines(added.prepared.directory / "raw" / f"{split}.cs")]  # fmt: skip
    assert raw == CZECH
    assert [added.prepared.sentences(split) for split in ("train", "valid", "test")] == [
        288,
        16,
        16,
    ]
    for split in ("train", "valid", "test"):
        words = [line.split() for line in lines(added.prepared.directory / "raw" / f"{split}.cs")]
        assert added.prepared.words(split) == sum(map(len, words))
    assert task_of()["task"]["kind"] == "language_model"


def test_tokenized_text_keeps_its_tokens(tmp_path: Path) -> None:
    odd = [(f"{a} x.y &amp; ( 3,5 )", f"{b} l'eau don't") for a, b in PAIRS]
    added = add(tmp_path, *parallel(tmp_path, odd), tokenized=True, bpe_merges=0)
    for side, column in (("cs", 0), ("fr", 1)):
        raw = lines(added.prepared.directory / "raw" / f"train.{side}")
        assert set(raw) <= {pair[column] for pair in odd}
        assert encoded(added, "train", side) == [[*line.split(), "</s>"] for line in raw]
    assert (added.prepared.text, added.prepared.bpe) == ("tokenized", None)


def test_own_bpe_codes(tmp_path: Path) -> None:
    codes = tmp_path / "codes"
    with codes.open("w", encoding="utf-8") as file:
        learn_bpe(io.StringIO("\n".join(CZECH)), file, 30)
    added = add(tmp_path, *parallel(tmp_path), bpe_codes=codes)
    bpe = BPE(codes.open(encoding="utf-8"))
    tokenized = lines(added.prepared.directory / "text" / "tokenized" / "test.fr")
    assert encoded(added, "test", "fr") == [
        [*bpe.process_line(s).split(), "</s>"] for s in tokenized
    ]
    assert added.prepared.bpe == "subword_nmt"


def test_own_sentencepiece_model(tmp_path: Path) -> None:
    library = pytest.importorskip("sentencepiece")
    text = write(tmp_path / "both", CZECH + FRENCH)
    library.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "m"), vocab_size=60, minloglevel=2
    )
    model = tmp_path / "m.model"
    added = add(tmp_path, *parallel(tmp_path), sentencepiece=model)
    processor = library.SentencePieceProcessor(model_file=str(model))
    raw = lines(added.prepared.directory / "raw" / "test.fr")
    expected = [[*processor.encode(line, out_type=str), "</s>"] for line in raw]
    assert encoded(added, "test", "fr") == expected
    assert (added.prepared.text, added.prepared.bpe) == ("plain", "sentencepiece")
    assert added.prepared.words("test", "fr") == sum(len(line.split()) for line in raw)


def in_pieces(line: str, marks: str) -> str:
    """Every word after its second letter in a piece of its own."""
    if marks == "sentencepiece":
        pieces = [p for word in line.split() for p in ("\u2581" + word[:2], word[2:])]
    else:
        pieces = [p for word in line.split()
                  for p in ((word[:2] + "@@", word[2:]) if word[2:] else (word,))]  # fmt: skip
    return " ".join(piece for piece in pieces if piece)


@pytest.mark.parametrize("marks", ["subword_nmt", "sentencepiece"])
def test_text_in_pieces(tmp_path: Path, marks: str) -> None:
    pieces = [tuple(in_pieces(line, marks) for line in pair) for pair in PAIRS]
    files = parallel(tmp_path, pieces)
    with pytest.raises(UserError, match=f"--segmented {marks.replace('_', '-')}"):
        add(tmp_path, *files)
    added = add(tmp_path, *files, segmented=marks)
    raw = lines(added.prepared.directory / "raw" / "valid.fr")
    assert encoded(added, "valid", "fr") == [[*line.split(), "</s>"] for line in raw]
    words = [FRENCH[[in_pieces(f, marks) for f in FRENCH].index(line)] for line in raw]
    assert lines(added.prepared.raw_reference("valid")) == words
    assert added.prepared.words("valid", "fr") == sum(len(line.split()) for line in words)
    assert added.prepared.bpe == marks
    assert added.prepared.text == ("tokenized" if marks == "subword_nmt" else "plain")


def test_marks_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no token of the cs text has its mark"):
        add(tmp_path, *parallel(tmp_path), segmented="sentencepiece")


def data_bin(tmp_path: Path, pairs: list[tuple[str, str]], *options: str) -> Path:
    """What fairseq-preprocess makes of pairs, split in three."""
    for split, part in (("train", pairs[:250]), ("valid", pairs[250:280]), ("test", pairs[280:])):
        (tmp_path / split).mkdir(exist_ok=True)
        parallel(tmp_path / split, part)
    prefixes = [
        f"--{split}pref={tmp_path / split / 'corpus'}" for split in ("train", "valid", "test")
    ]
    folder = tmp_path / "data-bin"
    arguments = [*prefixes, f"--destdir={folder}", *options]
    preprocess.main(preprocess.options.get_preprocessing_parser().parse_args(arguments))
    return folder


@pytest.mark.parametrize(("joined", "form"), [(True, "mmap"), (False, "mmap"), (True, "cached")])
def test_ready_data_of_fairseq(tmp_path: Path, joined: bool, form: str) -> None:
    pieces = [tuple(in_pieces(line, "subword_nmt") for line in pair) for pair in PAIRS]
    pieces[300] = pieces[300][0], pieces[300][1] + " jamais vu"  # two unknown words
    both = ["--source-lang=cs", "--target-lang=fr", f"--dataset-impl={form}"]
    folder = data_bin(tmp_path, pieces, *both, *(["--joined-dictionary"] if joined else []))
    added = add(tmp_path, folder)
    for path in folder.glob("*.*"):
        if path.name != "preprocess.log":
            assert (added.prepared.data_bin / path.name).read_bytes() == path.read_bytes()
    expected = FRENCH[280:]
    expected[20] += " \u2047 \u2047"
    assert lines(added.prepared.raw_reference("test")) == expected
    assert added.prepared.words("test") == sum(len(line.split()) for line in expected)
    assert added.prepared.tokens("test") == sum(len(t.split()) + 1 for _, t in pieces[280:])
    assert added.prepared.manifest["splits"]["test"]["unknown"]["fr"] == 2
    assert (added.prepared.bpe, added.prepared.text) == ("subword_nmt", "tokenized")
    shared = task_of()["fairseq"].get("model", {}).get("share_all_embeddings", True)
    assert shared == joined


def test_ready_data_of_a_language_model(tmp_path: Path) -> None:
    for split, part in (("train", CZECH[:250]), ("valid", CZECH[250:280]), ("test", CZECH[280:])):
        write(tmp_path / f"{split}.txt", part)
    prefixes = [f"--{split}pref={tmp_path / split}.txt" for split in ("train", "valid", "test")]
    folder = tmp_path / "bin"
    arguments = [*prefixes, f"--destdir={folder}", "--only-source"]
    preprocess.main(preprocess.options.get_preprocessing_parser().parse_args(arguments))
    added = add(tmp_path, folder)
    assert added.prepared.words("test") == sum(len(line.split()) for line in CZECH[280:])
    assert encoded(added, "test") == [[*line.split(), "</s>"] for line in CZECH[280:]]


def test_data_without_ends_of_sentences_is_refused(tmp_path: Path) -> None:
    folder = data_bin(tmp_path, PAIRS, "--source-lang=cs", "--target-lang=fr")
    old = MMapIndexedDataset(str(folder / "valid.cs-fr.fr"))
    cut = [old[i][:-1] for i in range(len(old))]
    del old
    builder = MMapIndexedDatasetBuilder(str(folder / "valid.cs-fr.fr.bin"))
    for tokens in cut:
        builder.add_item(tokens)
    builder.finalize(str(folder / "valid.cs-fr.fr.idx"))
    with pytest.raises(UserError, match=r"valid\.cs-fr\.fr\.bin, sentence 1: it does not end"):
        add(tmp_path, folder)
    assert own_corpora.own_names() == []


def test_incomplete_data_is_refused(tmp_path: Path) -> None:
    folder = data_bin(tmp_path, PAIRS, "--source-lang=cs", "--target-lang=fr")
    (folder / "test.cs-fr.fr.idx").unlink()
    with pytest.raises(UserError, match=r"lacks test.cs-fr.fr.idx"):
        add(tmp_path, folder)


def test_data_in_several_parts_is_refused(tmp_path: Path) -> None:
    """Without a word the corpus would be the first part alone."""
    folder = data_bin(tmp_path, PAIRS, "--source-lang=cs", "--target-lang=fr")
    for path in [*folder.glob("valid.*")]:
        shutil.copy(path, folder / path.name.replace("valid", "train1"))
    with pytest.raises(UserError, match=r"several parts \(train1.cs-fr"):
        add(tmp_path, folder)


ROWS = {
    split: [{"id": n, "translation": {"cs": cs, "fr": fr}} for n, (cs, fr) in enumerate(part)]
    for split, part in (
        ("train", PAIRS[:250]),
        ("validation", PAIRS[250:280]),
        ("test", PAIRS[280:]),
    )
}


def saved_to_disk(folder: Path) -> Path:
    """The layout of DatasetDict.save_to_disk."""
    arrow = pytest.importorskip("pyarrow")
    folder.mkdir()
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(ROWS)}))
    for split, rows in ROWS.items():
        (folder / split).mkdir()
        files = []
        for number in range(2):  # two shards
            name = f"data-{number:05}-of-00002.arrow"
            half = rows[: len(rows) // 2] if number == 0 else rows[len(rows) // 2 :]
            table = arrow.Table.from_pylist(half)
            sink = arrow.OSFile(str(folder / split / name), "wb")
            with sink, arrow.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
            files.append({"filename": name})
        (folder / split / "state.json").write_text(json.dumps({"_data_files": files}))
        (folder / split / "cache-1.arrow").write_bytes(b"of no interest")
    return folder


def as_parquet(folder: Path) -> Path:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (folder / "data").mkdir(parents=True)
    for split, rows in ROWS.items():
        path = folder / "data" / f"{split}-00000-of-00001.parquet"
        parquet.write_table(arrow.Table.from_pylist(rows), path)
    return folder


def as_json_lines(folder: Path) -> Path:
    folder.mkdir()
    for split, rows in ROWS.items():
        text = "\n".join(map(json.dumps, rows))
        (folder / f"{split}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def as_csv(folder: Path) -> Path:
    folder.mkdir()
    for split, rows in ROWS.items():
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["cs", "note", "fr"])
            table.writerows([row["translation"]["cs"], "a,\nb", row["translation"]["fr"]]
                            for row in rows)  # fmt: skip
    return folder


@pytest.mark.parametrize("form", [saved_to_disk, as_parquet, as_json_lines, as_csv])
def test_data_sets_of_hugging_face(tmp_path: Path, form: Any) -> None:
    folder = form(tmp_path / "hub")
    added = add(tmp_path, folder, languages=["cs", "fr"] if form is as_csv else [])
    for split, name in (("train", "train"), ("valid", "validation"), ("test", "test")):
        for code in ("cs", "fr"):
            expected = [row["translation"][code] for row in ROWS[name]]
            assert lines(added.prepared.directory / "raw" / f"{split}.{code}") == expected
    shard = next(path for path in sorted(folder.rglob("*train*")) + sorted(folder.rglob("data-*"))
                 if path.is_file())  # fmt: skip
    shard.write_bytes(shard.read_bytes() + b"\n")
    with pytest.raises(UserError, match=f"{shard.name} has changed"):
        prepare("mine", tmp_path / "data")


def test_rows_of_a_language_model(tmp_path: Path) -> None:
    """A cell may hold several lines; a JSON array is read as JSON lines are."""
    rows = [{"title": "t", "text": "\n".join(CZECH[i : i + 10])} for i in range(0, 320, 10)]
    path = tmp_path / "documents.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    added = add(tmp_path, path, languages=["cs"])
    raw = [line for split in ("train", "valid", "test")
           for line in lines(added.prepared.directory / "raw" / f"{split}.cs")]  # fmt: skip
    assert raw == CZECH


def test_columns_of_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [json.dumps({"a": a, "b": b, "c": "-"}) for a, b in PAIRS])
    with pytest.raises(UserError, match="columns a, b, c: choose by --columns"):
        add(tmp_path, path)
    with pytest.raises(UserError, match="there is no 'd'"):
        add(tmp_path, path, columns=["a", "d"])
    with pytest.raises(UserError, match="which languages are the columns a and b"):
        add(tmp_path, path, columns=["a", "b"])
    added = add(tmp_path, path, columns=["a", "b"], languages=["cs", "fr"])
    assert set(lines(added.prepared.directory / "raw" / "test.fr")) < set(FRENCH)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ('{"text": null}', "row 3: the cell 'text' holds no text but None"),
        ('{"text": 3}', "row 3: the cell 'text' holds no text but 3"),
        ("{", "line 3: not a JSON object"),
        ("[1]", "row 3: not an object"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: str, complaint: str) -> None:
    rows = ['{"text": "a b"}', '{"text": "c d"}', row]
    with pytest.raises(UserError, match=complaint):
        add(tmp_path, write(tmp_path / "t.jsonl", rows))


@pytest.mark.parametrize("library", ["pyarrow", "sentencepiece"])
def test_missing_libraries_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    original = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name.partition(".")[0] == library:
            raise ImportError(name)
        return original(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    (tmp_path / "x").write_bytes(b"x")
    with pytest.raises(UserError, match=f"pip install {library}"):
        if library == "pyarrow":
            add(tmp_path, (tmp_path / "x").rename(tmp_path / "x.parquet"))
        else:
            add(tmp_path, *parallel(tmp_path), sentencepiece=tmp_path / "x")


def test_folder_of_texts(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for split, part in (("train", PAIRS[:250]), ("dev", PAIRS[250:280]), ("test", PAIRS[280:])):
        czech, french = sides(part)
        write(folder / f"{split}.cs", czech)
        (folder / f"{split}.fr.gz").write_bytes(gzip.compress("\n".join(french).encode()))
    with pytest.raises(UserError, match="train in cs, fr: choose by --languages"):
        add(tmp_path, folder)
    added = add(tmp_path, folder, languages=["fr", "cs"])
    assert lines(added.prepared.raw_reference("valid")) == CZECH[250:280]


# --- text as files have it


def test_windows_line_ends_byte_order_mark_and_gzip(tmp_path: Path) -> None:
    czech, french = sides(PAIRS)
    text = "\ufeff" + "\r\n".join(czech)  # no end of the last line
    (tmp_path / "a.cs").write_bytes(gzip.compress(text.encode()))  # gzip by content, not by name
    added = add(tmp_path, tmp_path / "a.cs", write(tmp_path / "a.fr", french))
    texts = [line for split in ("train", "valid", "test")
             for line in lines(added.prepared.directory / "raw" / f"{split}.cs")]  # fmt: skip
    assert sorted(texts) == sorted(czech)
    assert "319 lines ended with CR LF" in "\n".join(added.lines)


def test_misaligned_files_are_refused(tmp_path: Path) -> None:
    czech, french = parallel(tmp_path)
    write(french, FRENCH[:-2])
    complaint = r"320 lines and .*318 lines;.* ends with line 318: '" + re.escape(FRENCH[317][:20])
    with pytest.raises(UserError, match=complaint):
        add(tmp_path, czech, french)


def test_empty_sides_are_refused_with_their_lines(tmp_path: Path) -> None:
    pairs = list(PAIRS)
    for number in (3, 50, 51, 200, 201, 202):
        pairs[number - 1] = (pairs[number - 1][0], "  ")
    files = parallel(tmp_path, pairs)
    with pytest.raises(UserError, match=r"6 lines \(3, 50, 51, 200, 201, \.\.\.\) with an empty"):
        add(tmp_path, *files)
    added = add(tmp_path, *files, drop_empty=True)
    assert sum(added.prepared.sentences(split) for split in ("train", "valid", "test")) == 314
    assert "left out 6 lines (3, 50, 51, 200, 201, ...)" in "\n".join(added.lines)


def test_blank_lines_of_a_language_model_are_kept_and_said(tmp_path: Path) -> None:
    text = [
        line for i, line in enumerate(CZECH) for line in ([line, ""] if i % 10 == 0 else [line])
    ]
    added = add(tmp_path, write(tmp_path / "t.cs", text))
    assert sum(added.prepared.sentences(split) for split in ("train", "valid", "test")) == 352
    assert "blank lines are kept" in "\n".join(added.lines)


def test_long_pairs_are_left_out_of_train(tmp_path: Path) -> None:
    pairs = [*PAIRS, ("a " * 251, "b"), ("a " * 250, "b")]
    added = add(tmp_path, *parallel(tmp_path, pairs))
    assert "left out 1 line (321) longer than 250 words" in "\n".join(added.lines)
    assert added.prepared.manifest["splits"]["train"]["raw_sentences"] == 321 - 32
    assert task_of()["fairseq"]["dataset"]["max_tokens"] >= 251


def test_sentences_beyond_every_model_are_refused(tmp_path: Path) -> None:
    train = parallel(tmp_path, PAIRS[:200])
    (tmp_path / "dev").mkdir()
    valid = parallel(tmp_path / "dev", [*PAIRS[200:210], ("a " * 1024, "b")])
    with pytest.raises(UserError, match=r"valid in cs has 1,025 tokens \(line 11 of valid"):
        add(tmp_path, *train, valid=valid)
    assert not own_corpora.task_file("mine").exists()
    assert own_corpora.own_names() == []


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (
            "dobrý\ná".encode("latin-1") + b"\n",
            r"line 1: not UTF-8 \(byte 0xfd at column 5\).*iconv",
        ),
        ("dobrý den".encode("utf-16"), "is UTF-16; convert it"),
        (b"a\nb\0c\n", "line 2: a zero byte"),
        (b"PK\x03\x04....", "is a zip archive; unpack it"),
        (gzip.compress(b"a b c\n" * 50, mtime=0)[:-9], "is damaged behind line"),
        (b"", "no text in"),
        (b"\n \n" * 50, "no text in"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "t.cs").write_bytes(content)
    with pytest.raises(UserError, match=complaint):
        add(tmp_path, tmp_path / "t.cs")
    assert not (own_folder() / "corpora" / "mine").exists()


def test_what_left_all_text_out_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no text in .*; train: left out .* longer than 1 words"):
        add(tmp_path, *parallel(tmp_path, PAIRS[:200]), max_words=1)


def test_words_of_one_character_have_nothing_to_merge(tmp_path: Path) -> None:
    text = [" ".join("abcdefgh"[n % k] for k in (2, 3, 5, 7)) for n in range(210)]
    given = write(tmp_path / "t.cs", text)
    with pytest.raises(UserError, match=r"no word of train has two characters.*--bpe-merges 0"):
        add(tmp_path, given)
    added = add(tmp_path, given, bpe_merges=0)
    assert added.prepared.tokens("train") == 5 * added.prepared.sentences("train")


def test_marks_of_fairseq_in_tokens_are_refused(tmp_path: Path) -> None:
    text = [*CZECH[:100], "konec </s>", *CZECH[100:]]
    with pytest.raises(UserError, match=r"1 line \(101\) with <s>, <pad> or </s> as a token"):
        add(tmp_path, write(tmp_path / "t.cs", text), tokenized=True)
    add(tmp_path, write(tmp_path / "t.cs", text))  # the tokenizer takes it apart


def test_lines_in_several_splits_are_counted(tmp_path: Path) -> None:
    train = parallel(tmp_path, PAIRS[:200])
    for name, part in (("dev", PAIRS[190:230]), ("test", PAIRS[228:250])):
        (tmp_path / name).mkdir()
        parallel(tmp_path / name, part)
    valid = [tmp_path / "dev" / path.name for path in train]
    test = [tmp_path / "test" / path.name for path in train]
    said = "\n".join(add(tmp_path, *train, valid=valid, test=test).lines)
    assert "10 of 40 sentence pairs of valid (25.0%) are also in train" in said
    assert "2 of 22 sentence pairs of test (9.1%) are also in valid" in said
    with pytest.raises(UserError, match="all 200 sentence pairs of test are also in train"):
        add(tmp_path, *train, valid=valid, test=train, replace=True)


def test_codes_of_another_program_are_explained(tmp_path: Path) -> None:
    files = parallel(tmp_path)
    with pytest.raises(UserError, match=r"line 1: three columns, as fastBPE writes.*cut -d"):
        add(tmp_path, *files, bpe_codes=write(tmp_path / "codes", ["e n 120", "e r</w> 90"]))
    with pytest.raises(UserError, match="line 2: 'a b c d' is not a merge"):
        add(tmp_path, *files, bpe_codes=write(tmp_path / "codes", ["#version: 0.2", "a b c d"]))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"name": "multi30k"}, "a name of the project's"),
        ({"name": "null"}, "a name of the project's"),
        ({"name": "a/b"}, "cannot be the name"),
        ({"languages": ["cs", "pt_BR"]}, "leave regions and scripts out"),
        ({"languages": ["cs"]}, "two are needed"),
        ({"languages": ["fr", "cs"]}, "in the other order"),
        ({"languages": ["de", "de"]}, "have the same code de"),
        ({"bpe_merges": -1}, "at least 0"),
        ({"bpe_merges": 3, "segmented": "subword_nmt"}, "are alternatives"),
        ({"columns": ["a", "b"]}, "--columns is for rows"),
        ({"valid": [Path("nowhere")]}, "no file or folder nowhere"),
    ],
)
def test_impossible_requests_are_explained(tmp_path: Path, options: dict, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        add(tmp_path, *parallel(tmp_path), **options)
    assert own_corpora.own_names() == []


def test_sources_in_the_folder_of_data_are_left_alone(tmp_path: Path) -> None:
    folder = data_bin(tmp_path, PAIRS, "--source-lang=cs", "--target-lang=fr")
    (tmp_path / "data" / "mine").mkdir(parents=True)
    folder = folder.rename(tmp_path / "data" / "mine" / "data-bin")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    added = add(tmp_path, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not added.prepared.directory.samefile(folder.parent)


# --- later


def test_a_changed_source_is_noticed_and_replaced(tmp_path: Path) -> None:
    czech, french = parallel(tmp_path)
    first = add(tmp_path, czech, french)
    before = task_of()["task"]["corpus"]
    assert prepare(before, tmp_path / "data").manifest == first.prepared.manifest
    stat = french.stat()
    changed = french.read_bytes().replace(b"deux", b"deuz")
    french.write_bytes(changed)  # the same size, and the same time
    os.utime(french, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(UserError, match=r"corpus\.fr has changed since the corpus mine") as error:
        prepare(before, tmp_path / "data")
    with pytest.raises(UserError, match="there is a corpus mine already"):
        add(tmp_path, czech, french)
    command = re.search(r"python scripts/add_corpus.py (.*) \(runs", str(error.value))[1]
    assert str(french) in shlex.split(command) and "--replace" in command
    again = add(tmp_path, czech, french, replace=True)
    after = task_of()["task"]["corpus"]
    assert after != before and "deuz" in (again.prepared.raw_reference("train")).read_text()
    assert prepare(after, tmp_path / "data").manifest == again.prepared.manifest
    # runs on the earlier text can still be evaluated, as long as their data are there
    assert prepare(before, tmp_path / "data").manifest == first.prepared.manifest
    shutil.rmtree(first.prepared.directory)
    with pytest.raises(UserError, match="mine is another one now"):
        prepare(before, tmp_path / "data")


def test_a_source_that_only_moved_or_was_touched_is_no_change(tmp_path: Path) -> None:
    czech, french = parallel(tmp_path)
    add(tmp_path, czech, french)
    os.utime(french)
    czech.rename(tmp_path / "elsewhere")
    assert prepare("mine", tmp_path / "data").sentences("train") == 288
    # the copy is enough to prepare it elsewhere
    assert prepare("mine", tmp_path / "other").sentences("train") == 288


def test_a_damaged_copy_is_noticed(tmp_path: Path) -> None:
    add(tmp_path, *parallel(tmp_path))
    copy = own_corpora.folder_of("mine") / "train.cs"
    copy.write_bytes(copy.read_bytes().replace(b"dva", b"dvb"))
    with pytest.raises(UserError, match=r"train\.cs is missing or has been changed"):
        prepare("mine", tmp_path / "other")


def test_an_edited_task_survives(tmp_path: Path) -> None:
    files = parallel(tmp_path)
    add(tmp_path, *files)
    task = own_corpora.task_file("mine")
    task.write_text(task.read_text().replace("clip_norm: 1.0", "clip_norm: 0.3  # mine"))
    old = task_of()
    write(files[0], [line.replace("dva", "dvě") for line in CZECH])
    add(tmp_path, *files, replace=True)
    new = task_of()
    assert "clip_norm: 0.3  # mine" in task.read_text()
    assert new["task"].pop("corpus") != old["task"].pop("corpus")
    assert new == old


def test_failure_leaves_the_earlier_corpus(tmp_path: Path) -> None:
    files = parallel(tmp_path)
    add(tmp_path, *files)
    before = {path: path.read_bytes() for path in own_folder().rglob("*") if path.is_file()}
    write(files[0], ["", *CZECH[1:]])
    with pytest.raises(UserError, match="with an empty side"):
        add(tmp_path, *files, replace=True)
    (tmp_path / "dev").mkdir()
    valid = parallel(tmp_path / "dev", [("a " * 1100, "b"), ("c", "d")])
    with pytest.raises(UserError, match="a model reads at most"):  # after it was prepared
        add(tmp_path, write(files[0], CZECH), files[1], valid=valid, replace=True)
    assert {path: path.read_bytes() for path in own_folder().rglob("*") if path.is_file()} == before
    assert prepare(task_of()["task"]["corpus"], tmp_path / "data").sentences("valid") == 16


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    files = parallel(tmp_path)
    add(tmp_path, *files)
    folder, old = own_corpora.folder_of("mine"), own_folder() / "partial" / "mine" / "old"
    old.parent.mkdir(parents=True)
    folder.rename(old)
    with pytest.raises(UserError, match="there is a corpus mine already"):
        add(tmp_path, *files)
    assert folder.is_dir()


def test_names_of_two_owners_are_an_error(tmp_path: Path, catalogue_with: Any) -> None:
    add(tmp_path, *parallel(tmp_path))
    catalogue = catalogue_with("toy_translation")
    text = catalogue.read_text().replace("toy_translation:", "mine:")
    catalogue.write_text(text)
    with pytest.raises(UserError, match="two corpora mine"):
        prepare("mine", tmp_path / "data", catalogue=catalogue)


@pytest.mark.parametrize("damage", ["origin:", "corpora: [", "x: 1"])
def test_damaged_entries_are_named_and_replaced(
    tmp_path: Path, damage: str, catalogue_with: Any
) -> None:
    files = parallel(tmp_path)
    add(tmp_path, *files)
    entry = own_corpora.folder_of("mine") / own_corpora.ENTRY
    entry.write_text(damage if damage != "origin:" else entry.read_text().split("origin:")[0])
    with pytest.raises(UserError, match=r"catalogue\.yaml"):
        prepare("mine", tmp_path / "data")
    other = catalogue_with("toy_language_model", sizes={"train": 50, "valid": 9, "test": 9})
    assert prepare("toy_language_model", tmp_path / "data", catalogue=other)  # not concerned
    with pytest.raises(UserError, match=r"catalogue\.yaml"):
        add(tmp_path, *files)
    assert add(tmp_path, *files, replace=True).prepared.sentences("test") == 16


def test_fingerprints_of_the_projects_corpora_are_as_before_own_ones() -> None:
    """Computed at d08be8c: a change would prepare every corpus anew."""
    known = load_catalogue()
    before = {"toy_translation": "5ea67093d486", "ptb": "ac063cca3335", "wmt14": "d4beb69be0d3"}
    assert {name: known[name].fingerprint()[:12] for name in before} == before
