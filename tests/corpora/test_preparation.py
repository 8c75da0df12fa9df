"""From a name to fairseq's data: the whole way, again, interrupted, and twice at once."""

import errno
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from support.processes import is_running, processes_below
from support.stand_ins import (
    PTB_ARCHIVES,
    PTB_TEXT,
    archive_entry,
    local_folder,
    ptb_catalogue_archives,
    text_lines,
)

from normexp.corpora import binarization, preparation, prepare
from normexp.corpora.atomic_stage import locked
from normexp.corpora.catalogue import load_catalogue
from normexp.corpora.toy import translation
from normexp.errors import UserError

SIZES = {"train": 1500, "valid": 40, "test": 60}


def stock_fairseq(corpus, target: Path, *options: str) -> None:
    """fairseq-preprocess on the text stage, in a child process, since it configures logging.

    The child is forked: importing fairseq would take longer than all the rest.
    """
    folder = corpus.directory / "text" / ("bpe" if corpus.bpe else "tokenized")
    suffix = "" if corpus.kind == "translation" else ".en"
    prefixes = [f"--{split}pref={folder / split}{suffix}" for split in ("train", "valid", "test")]
    arguments = [*prefixes, f"--destdir={target}", *options]
    child = multiprocessing.get_context("fork").Process(target=preprocess, args=(arguments,))
    child.start()
    child.join()
    assert child.exitcode == 0


def preprocess(arguments: list[str]) -> None:
    from fairseq_cli.preprocess import cli_main

    sys.argv = ["fairseq-preprocess", *arguments]
    cli_main()


def assert_same_data(data_bin: Path, stock: Path) -> None:
    names = {path.name for path in stock.iterdir()} - {"preprocess.log"}
    assert names == {path.name for path in data_bin.iterdir()} - {"stage.json"}
    for name in names:
        assert (data_bin / name).read_bytes() == (stock / name).read_bytes(), name


def test_toy_translation(tmp_path, catalogue_with) -> None:
    catalogue = catalogue_with("toy_translation", sizes=SIZES, bpe_merges=200)
    corpus = prepare("toy_translation", tmp_path, progress=False, catalogue=catalogue)

    assert (corpus.name, corpus.kind, corpus.bpe) == (
        "toy_translation",
        "translation",
        "subword_nmt",
    )
    assert (corpus.source_language, corpus.target_language) == ("de", "en")
    text = corpus.directory / "text"
    for split, size in SIZES.items():
        raw = text_lines(corpus.directory / "raw" / f"{split}.en")
        assert text_lines(corpus.raw_reference(split)) == raw
        assert corpus.sentences(split) == len(raw) == size
        for language in ("de", "en"):
            words = text_lines(text / "tokenized" / f"{split}.{language}")
            tokens = text_lines(text / "bpe" / f"{split}.{language}")
            assert [line.replace("@@ ", "") for line in tokens] == words
            assert words == [line.lower() for line in words]
            assert corpus.words(split, language) == sum(len(line.split()) for line in words)
            assert corpus.tokens(split, language) == sum(len(line.split()) + 1 for line in tokens)
    assert corpus.words("test") == corpus.words("test", "en")
    assert corpus.tokens("train") == corpus.tokens("train", "en") > corpus.words("train")

    stock_fairseq(corpus, tmp_path / "stock", "--source-lang=de", "--target-lang=en",
                  "--joined-dictionary")  # fmt: skip
    assert_same_data(corpus.data_bin, tmp_path / "stock")

    # Any number of processes gives the same result.
    recipe = load_catalogue(catalogue)["toy_translation"]
    for workers in (1, 3):
        (tmp_path / str(workers)).mkdir()
        binarization.build_binary(recipe, text, tmp_path / str(workers), workers, False)
        assert_same_data(tmp_path / str(workers), tmp_path / "stock")

    codes = tmp_path / "codes"
    both = b"".join(
        (text / "tokenized" / f"train.{language}").read_bytes() for language in ("de", "en")
    )
    learn = ["subword-nmt", "learn-bpe", "-s", "200", "-o", str(codes)]
    apply = ["subword-nmt", "apply-bpe", "-c", str(codes)]
    tool = [sys.executable, "-c", "from subword_nmt.subword_nmt import main; main()"]
    subprocess.run(tool + learn[1:], input=both, check=True, capture_output=True)
    assert codes.read_bytes() == (text / "bpe.codes").read_bytes()
    test = (text / "tokenized" / "test.en").read_bytes()
    done = subprocess.run(tool + apply[1:], input=test, check=True, capture_output=True)
    assert done.stdout == (text / "bpe" / "test.en").read_bytes()


def test_toy_language_model(tmp_path, catalogue_with) -> None:
    catalogue = catalogue_with("toy_language_model", sizes=SIZES, bpe_merges=200)
    corpus = prepare("toy_language_model", tmp_path, progress=False, catalogue=catalogue)
    assert (corpus.kind, corpus.bpe) == ("language_model", "subword_nmt")
    assert corpus.source_language is corpus.target_language is None
    assert corpus.tokens("test") - corpus.sentences("test") > corpus.words("test") > 0
    with pytest.raises(ValueError, match="no references"):
        corpus.raw_reference("test")
    stock_fairseq(corpus, tmp_path / "stock", "--only-source")
    assert_same_data(corpus.data_bin, tmp_path / "stock")


@pytest.fixture
def ptb(tmp_path, catalogue_with):
    """Prepares the stand-in of PTB; keys replace those of its catalogue entry."""
    local = local_folder(tmp_path / "local", PTB_ARCHIVES)

    def run(local: Path | None = local, **replaced):
        catalogue = catalogue_with("ptb", **{"archives": ptb_catalogue_archives()} | replaced)
        return prepare("ptb", tmp_path / "data", local, progress=False, catalogue=catalogue)

    return run


def test_word_level_language_model(ptb, tmp_path) -> None:
    corpus = ptb()
    assert corpus.bpe is None
    assert (corpus.sentences("train"), corpus.words("train"), corpus.tokens("train")) == (
        40,
        140,
        180,
    )
    assert (corpus.sentences("test"), corpus.words("test"), corpus.tokens("test")) == (2, 4, 6)
    for split in ("train", "valid", "test"):
        raw = (corpus.directory / "raw" / f"{split}.en").read_text(encoding="utf-8")
        assert raw == PTB_TEXT[f"ptb.{split}.txt"]
    # <unk> in the text is the dictionary's own symbol; "d" alone is replaced by it
    assert corpus.manifest["splits"]["train"]["unknown"] == {"en": 0}
    assert corpus.manifest["splits"]["test"]["unknown"] == {"en": 1}
    with pytest.raises(ValueError, match="no split 'dev', only train, valid, test"):
        corpus.sentences("dev")
    with pytest.raises(ValueError, match="no language 'de'"):
        corpus.words("test", "de")


def test_by_download(ptb, mirror) -> None:
    mirror.files |= {f"/{name}": content for name, content in PTB_ARCHIVES.items()}
    urls = {name: [f"{mirror.url}/{name}"] for name in PTB_ARCHIVES}
    corpus = ptb(local=None, archives=ptb_catalogue_archives(urls))
    assert corpus.manifest["files"] == ptb().manifest["files"]
    assert len(mirror.requests) == 3


def test_manifest_says_nothing_of_the_machine(ptb, tmp_path) -> None:
    text = (ptb().directory / "manifest.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    assert os.uname().nodename not in text


def forbid(monkeypatch, *stages: str) -> None:
    def build(*arguments):
        raise AssertionError("made again")

    for stage in stages:
        monkeypatch.setattr(preparation, f"build_{stage}", build)


def test_finished_corpus_is_not_touched(ptb, monkeypatch) -> None:
    first = ptb()
    shutil.rmtree(first.directory / "archives")
    forbid(monkeypatch, "text", "binary")
    monkeypatch.setattr(preparation, "build_raw", None)
    assert ptb(local=Path("/nowhere")) == first


def test_changed_recipe_prepares_anew(ptb) -> None:
    assert ptb().bpe is None
    changed = ptb(bpe_merges=3)
    assert changed.bpe == "subword_nmt"
    assert (changed.directory / "text" / "bpe.codes").exists()
    again = ptb()
    assert again.bpe is None
    assert not (again.directory / "text" / "bpe.codes").exists()


@pytest.mark.parametrize(
    "lost", ["data-bin/train.bin", "text/tokenized/test.en", "raw/valid.en", "manifest.json"]
)
def test_lost_or_cut_files_are_made_again(ptb, lost: str) -> None:
    first = ptb()
    content = (first.directory / lost).read_bytes()
    for damaged in (None, content[:5]):
        (first.directory / lost).unlink()
        if damaged is not None:
            (first.directory / lost).write_bytes(damaged)
        assert ptb() == first
        assert (first.directory / lost).read_bytes() == content


def test_goes_on_behind_the_last_finished_stage(ptb, monkeypatch) -> None:
    whole = ptb()
    expected = whole.manifest
    shutil.rmtree(whole.directory)

    def interrupted(corpus, text, folder, workers, progress):
        (folder / "dict.txt").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "build_binary", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ptb()
    assert not (whole.directory / "manifest.json").exists()
    assert not (whole.directory / "data-bin").exists()

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "build_text", None)
        patch.setattr(preparation, "build_raw", None)
        assert ptb().manifest == expected
    assert not list(whole.directory.glob("*.partial"))


def test_folders_without_record_are_not_taken_for_finished(ptb) -> None:
    whole = ptb()
    for stage in ("raw", "text", "data-bin"):
        shutil.copytree(whole.directory / stage, whole.directory / f"{stage}.partial")
        (whole.directory / stage / "stage.json").unlink()
    cut = whole.directory / "text" / "tokenized" / "train.en"
    cut.write_text("half")
    (whole.directory / "manifest.json").unlink()
    assert ptb() == whole
    assert cut.read_text(encoding="utf-8") == PTB_TEXT["ptb.train.txt"]


def test_killed_preparation(tmp_path, catalogue_with) -> None:
    """SIGKILL for the main process only, as when memory runs out, while others work for it.

    Those neither hold the lock nor stay behind; the next preparation equals an undisturbed one.
    """
    catalogue = catalogue_with("toy_translation", sizes=SIZES | {"train": 3000}, bpe_merges=100)
    script = (
        "from pathlib import Path; from normexp.corpora import prepare, preparation; "
        "preparation.available_cores = lambda: 2; "
        f"prepare('toy_translation', Path({str(tmp_path / 'killed')!r}), progress=False, "
        f"catalogue=Path({str(catalogue)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    try:
        workers = []
        while len(workers) < 2:
            assert process.poll() is None
            workers = processes_below(process.pid)
            time.sleep(0.001)
    finally:
        process.kill()
        process.wait()
    partial = list((tmp_path / "killed" / "toy_translation").glob("text.*.partial"))
    assert len(partial) == 1
    corpora = [
        prepare("toy_translation", tmp_path / name, progress=False, catalogue=catalogue)
        for name in ("killed", "undisturbed")
    ]
    assert corpora[0].manifest == corpora[1].manifest
    assert not partial[0].exists()
    deadline = time.monotonic() + 10
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline, "processes stay behind"
        time.sleep(0.01)


def test_a_second_process_waits_and_then_finds_the_work_done(ptb, tmp_path) -> None:
    finished = ptb()
    shutil.move(tmp_path / "data", tmp_path / "aside")
    script = (
        "import logging, sys; from pathlib import Path; from normexp.corpora import prepare; "
        "logging.basicConfig(level=logging.INFO, stream=sys.stdout); "
        f"prepare('ptb', Path({str(tmp_path / 'data')!r}), Path({str(tmp_path / 'local')!r}), "
        f"catalogue=Path({str(tmp_path / 'catalogue.yaml')!r}))"
    )
    with locked(tmp_path / "data" / "ptb.lock"):
        second = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert "another process is preparing this corpus" in second.stdout.readline()
        assert not (tmp_path / "data" / "ptb").exists()
        shutil.move(tmp_path / "aside" / "ptb", tmp_path / "data" / "ptb")
    output, _ = second.communicate(timeout=60)
    assert (second.returncode, output) == (0, "")  # it would log the making of a stage
    assert ptb() == finished


def test_unknown_name(tmp_path) -> None:
    with pytest.raises(UserError, match="no corpus 'wmt99'; known are toy_translation, "):
        prepare("wmt99", tmp_path)


def test_local_must_be_a_folder(ptb, tmp_path) -> None:
    with pytest.raises(UserError, match=r"data\.local=/no/where is not a folder"):
        ptb(local=Path("/no/where"))


def test_too_little_disk_space(ptb, tmp_path) -> None:
    with pytest.raises(UserError, match=r"needs 1000000000\.0 GB in .*ptb, where"):
        ptb(disk_space=10**18)
    assert not (tmp_path / "data" / "ptb" / "archives").exists()


def test_what_is_there_needs_no_space_any_more(ptb, tmp_path, monkeypatch) -> None:
    """Neither the corpus's own files nor archives in the folder of another corpus."""
    own, shared = tmp_path / "data" / "ptb" / "raw", tmp_path / "data" / "wmt14" / "archives"
    for folder, size in ((own, 60), (shared, 30)):
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(bytes(size))
    monkeypatch.setattr(preparation.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10))
    with pytest.raises(UserError, match="ptb needs"):
        ptb(disk_space=101, archives_of="wmt14")
    ptb(disk_space=100, archives_of="wmt14")


def test_texts_of_different_length(tmp_path, catalogue_with) -> None:
    texts = {f"{split}.{language}": b"a\nb\n" for split in ("train", "val", "test_2016_flickr")
             for language in ("de", "en")}  # fmt: skip
    texts["val.en"] = b"a\n"
    archives = {name: [archive_entry(f"{name}.txt", content)] for name, content in texts.items()}
    local = local_folder(tmp_path / "local", {f"{name}.txt": text for name, text in texts.items()})
    catalogue = catalogue_with("multi30k", archives=archives)
    with pytest.raises(UserError, match=r"val.de and val.en differ in their number of lines"):
        prepare("multi30k", tmp_path, local, progress=False, catalogue=catalogue)


def test_carriage_return_at_which_fairseq_preprocess_would_split(ptb, tmp_path) -> None:
    content = b"a b\rc\r\n" * 3
    (tmp_path / "local" / "ptb.train.txt").write_bytes(content)
    archives = ptb_catalogue_archives() | {
        "ptb.train.txt": [archive_entry("ptb.train.txt", content)]
    }
    corpus = ptb(archives=archives)
    assert (corpus.sentences("train"), corpus.words("train"), corpus.tokens("train")) == (3, 9, 12)


def test_separators_that_end_no_line(ptb, tmp_path) -> None:
    content = "a\u2028b c\u0085d\n".encode() * 3
    (tmp_path / "local" / "ptb.train.txt").write_bytes(content)
    archives = ptb_catalogue_archives() | {
        "ptb.train.txt": [archive_entry("ptb.train.txt", content)]
    }
    corpus = ptb(archives=archives)
    assert (corpus.sentences("train"), corpus.words("train"), corpus.tokens("train")) == (3, 12, 15)


WRONG = {"splits": {"test": {"words": {"en": 5}}}, "dictionary_types": {"en": 8},
         "hashes": {"raw/test.en": "md5:0", "raw/no.en": "sha256:0"}}  # fmt: skip


def test_enforced_counts(ptb) -> None:
    with pytest.raises(UserError) as error:
        ptb(expected=WRONG | {"enforced": True})
    assert "raw/test.en: md5:" in str(error.value)
    assert "raw/no.en: None instead of sha256:0" in str(error.value)
    assert "splits.test.words.en" not in str(error.value)  # it is made from raw/test.en
    assert "; 1 more values differ" in str(error.value)
    assert "dictionary_types" not in str(error.value)


def test_other_differences_are_warnings_with_their_cause(ptb, caplog) -> None:
    known = [{"quantity": "splits.test.words.en", "value": 4, "cause": "a word was lost"}]
    ptb(expected=WRONG, known_deviations=known)
    assert "splits.test.words.en: 4 instead of 5 (a word was lost)" in caplog.text


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_disk_that_takes_no_more(ptb, monkeypatch, tmp_path, number: int) -> None:
    def full(corpus, raw, folder, workers, progress):
        raise OSError(number, os.strerror(number), str(folder / "x"))

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "build_text", full)
        with pytest.raises(UserError, match=rf"cannot write to {tmp_path}.*{os.strerror(number)}"):
            ptb()
    assert ptb().sentences("test") == 2


@pytest.mark.parametrize("file", ["english.py", "german_english.yaml"])
def test_changed_generator_or_lexicon_makes_another_corpus(tmp_path, monkeypatch, file) -> None:
    corpus = load_catalogue()["toy_translation"]
    fingerprint = preparation._fingerprint(corpus)
    toy = shutil.copytree(Path(translation.__file__).parent, tmp_path / "toy")
    module = types.SimpleNamespace(__file__=str(toy / "translation.py"))
    monkeypatch.setattr(preparation, "_generator", lambda _: module)
    assert preparation._fingerprint(corpus) == fingerprint
    with (toy / file).open("a", encoding="utf-8") as source:
        source.write("# changed\n")
    assert preparation._fingerprint(corpus) != fingerprint
