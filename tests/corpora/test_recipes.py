"""Every corpus from URL to data-bin, on small archives of the real layout."""

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from subword_nmt.apply_bpe import BPE
from support.stand_ins import (
    IWSLT14_SETS,
    PTB_ARCHIVES,
    PTB_TEXT,
    archive_entry,
    gzipped,
    iwslt14_members,
    served,
    tar_gz,
    text_lines,
    zip_file,
)

from normexp.corpora import PreparedCorpus, prepare
from normexp.corpora.catalogue import CATALOGUE
from normexp.errors import UserError


@pytest.fixture
def run(tmp_path, catalogue_with, mirror):
    """Prepares a corpus of the catalogue from archives, name to file and content, on a mirror."""

    def run_(name: str, archives: dict[str, tuple[str, bytes]], **replaced) -> PreparedCorpus:
        entries = {
            key: [archive_entry(*file, urls=served(mirror, *file))]
            for key, file in archives.items()
        }
        catalogue = catalogue_with(name, archives=entries, **replaced)
        corpus = prepare(name, tmp_path / "data", progress=False, catalogue=catalogue)
        for split in ("train", "valid", "test"):
            for language in corpus.manifest["languages"]:
                tokens = corpus.directory / "text" / ("bpe" if corpus.bpe else "tokenized")
                lines = text_lines(tokens / f"{split}.{language}")
                assert corpus.sentences(split) == len(lines)
                assert corpus.tokens(split, language) == sum(len(x.split()) + 1 for x in lines)
        return corpus

    return run_


def split_lines(corpus: PreparedCorpus, stage: str, split: str) -> list[tuple[str, ...]]:
    folder = corpus.directory / stage
    columns = [text_lines(folder / f"{split}.{lang}") for lang in corpus.manifest["languages"]]
    return list(zip(*columns, strict=True))


def test_iwslt14(run) -> None:
    # (German, English, what becomes of the pair) in the order of train.tags
    long = " ".join(["Wort"] * 175)
    pairs = [
        ("<url>http://a</url>", "<url>http://a</url>", None),
        ("<keywords>x</keywords>", "<keywords>x</keywords>", None),
        ("<talkid>1</talkid>", "<talkid>1</talkid>", None),
        ("<title>Der Titel</title>", "<title>The Title</title>", ("der titel", "the title")),
        ("<description>Ein Text</description>", "<description>A text</description>",
         ("ein text", "a text")),
        ("drei Wörter hier", "two words", ("drei wörter hier", "two words")),
        ("vier Wörter sind hier", "two words", None),
        ("", "", None),
        ("\u00a0", "x", None),
        (long, long, (long.lower(), long.lower())),
        (f"{long} zuviel", long, None),
        ("Es ist\u2019s usw.", "It\u2019s Dr. No.", ("es ist ’ s usw .", "it ’ s dr. no .")),
        ("a\u2028b c\u0085d e\rf", "g\u2028h i\u0085j k\r", ("a b c d e f", "g h i j k")),
    ]  # fmt: skip
    pairs += [(f"Satz {n} A", f"Line {n} B", (f"satz {n} a", f"line {n} b")) for n in range(60)]
    members = iwslt14_members([pair[:2] for pair in pairs])
    corpus = run("iwslt14", {"de-en": ("de-en.tgz", tar_gz(members))}, bpe_merges=50)

    clean = [pair for _, _, pair in pairs if pair is not None]
    assert split_lines(corpus, "text/tokenized", "valid") == clean[22::23]
    train = [pair for number, pair in enumerate(clean, 1) if number % 23]
    assert split_lines(corpus, "text/tokenized", "train") == train
    assert corpus.sentences("train") + corpus.sentences("valid") == len(clean)
    kept = [english for _, english, pair in pairs if pair is not None]
    references = [line.removeprefix("<title>").removesuffix("</title>") for line in kept[22::23]]
    assert text_lines(corpus.raw_reference("valid")) == references

    test = split_lines(corpus, "text/tokenized", "test")
    assert len(test) == 10
    for file, (german, english) in zip(IWSLT14_SETS, test[::2], strict=True):
        assert german == f"{file.lower()} it &apos; s a"
        assert english == f"{file.lower()} it &apos;s a"
    assert text_lines(corpus.raw_reference("test"))[0] == "TED.dev2010 It\u2019s A"
    dictionaries = [(corpus.data_bin / f"dict.{lang}.txt").read_bytes() for lang in ("de", "en")]
    assert dictionaries[0] == dictionaries[1]
    assert corpus.lowercase


def git_blob(content: str) -> str:
    shown = subprocess.run(
        ["git", "hash-object", "--stdin"], input=content.encode(), capture_output=True, check=True
    )
    return f"git_blob:{shown.stdout.decode().strip()}"


def test_iwslt14_is_compared_stage_by_stage(run, caplog) -> None:
    """Hashes of what the archive holds and of the text behind each step, as git prints them."""
    pairs = [(f"Satz {n}, usw.", f"Line {n}, \u2019s") for n in range(60)]
    pairs[7] = ("zu viele Wörter", "Few")
    members = iwslt14_members(pairs)
    tokenized = [f"Satz {n} , usw ." for n in range(60)]
    tokenized[7] = "zu viele Wörter"
    clean = tokenized[:7] + tokenized[8:]
    train = "train.tags.de-en.de"
    texts = {"tokenize": tokenized, "clean": clean, "lowercase": [line.lower() for line in clean]}
    hashes = {
        f"text/steps/train.{step}.de": git_blob("".join(f"{line}\n" for line in lines))
        for step, lines in texts.items()
    }
    archives = {"de-en": ("de-en.tgz", tar_gz(members))}
    wanted = {"enforced": True, "hashes": hashes,
              "members": {"de-en": {train: git_blob(members[f"de-en/{train}"])}}}  # fmt: skip
    corpus = run("iwslt14", archives, expected=wanted, bpe_merges=50)
    assert corpus.manifest["members"]["de-en"].keys() == {train}
    for step in texts:
        assert f"text/steps/train.{step}.en" in corpus.manifest["files"]

    shutil.rmtree(corpus.directory)
    real = yaml.safe_load(CATALOGUE.read_text(encoding="utf-8"))["corpora"]["iwslt14"]["expected"]
    run("iwslt14", archives, expected=real, bpe_merges=50)
    xml = "IWSLT14.TED.tst2012.de-en.en.xml"
    assert f"{hashlib.sha256(members[f'de-en/{xml}'].encode()).hexdigest()} instead" in caplog.text
    # All files of the archive are others, so nothing else is to be explained.
    told = [record.getMessage() for record in caplog.records]
    *files, rest = [line for line in told if line.startswith("corpus iwslt14: ")]
    assert len(files) == len(real["members"]["de-en"]) == 12
    for file in files:
        assert ": members.de-en." in file
        assert file.endswith("(the file in the archive is not the published one)")
    assert re.search(r": \d\d more values differ, of what is made from these$", rest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"de-en/train.tags.de-en.en": "one line too few\n" * 49}, "differ in their number of"),
        ({"de-en/IWSLT14.TED.tst2010.de-en.de.xml": None}, "0 files named IWSLT14.TED.tst2010"),
        (
            {f"de-en/train.tags.de-en.{language}": "" for language in ("de", "en")},
            "the recipe leaves no line in train",
        ),
    ],
    ids=["unequal line counts", "missing member", "empty file"],
)
def test_iwslt14_archive_with_a_defect(run, change: dict, message: str) -> None:
    members = iwslt14_members([(f"Satz {n}", f"Line {n}") for n in range(50)]) | change
    members = {name: text for name, text in members.items() if text is not None}
    with pytest.raises(UserError, match=message):
        run("iwslt14", {"de-en": ("de-en.tgz", tar_gz(members))})


def test_iwslt14_with_a_dictionary_for_each_language(run) -> None:
    pairs = [(f"Satz {n} ß", f"Line {n} w") for n in range(60)]
    archive = ("de-en.tgz", tar_gz(iwslt14_members(pairs)))
    corpus = run("iwslt14_separate", {"de-en": archive}, bpe_merges=50)
    german, english = (
        (corpus.data_bin / f"dict.{lang}.txt").read_text(encoding="utf-8") for lang in ("de", "en")
    )
    assert "ß 58" in german.split("\n") and "ß" not in english  # 60 less every 23rd
    assert "w 58" not in german.split("\n")


def test_multi30k(run) -> None:
    names = {"train": "train", "valid": "val", "test": "test_2016_flickr"}
    archives = {}
    for split, name in names.items():
        for language, text in (("de", "Der „Dr. X“ läuft\u2028weg."), ("en", "A man\rand Dr. X.")):
            lines = "".join(f"{text} {split} {n}.\n" for n in range(30)).encode()
            archives[f"{name}.{language}"] = (f"{name}.{language}.gz", gzipped(lines))
    corpus = run("multi30k", archives, bpe_merges=40)
    for split in names:
        assert split_lines(corpus, "text/tokenized", split)[7] == (
            # The normalization takes the CR away; a dot before a small letter stays.
            f"der &quot; dr. x &quot; läuft weg. {split} 7 .",
            f"a manand dr. x. {split} 7 .",
        )


def test_ptb_from_the_original_archive(tmp_path, catalogue_with, mirror) -> None:
    """The files one by one are nowhere to be had; the archive is fetched once for all of them."""
    files = {f"./simple-examples/data/{name}": text for name, text in PTB_TEXT.items()}
    files["./simple-examples/data/ptb.char.train.txt"] = "not read\n"
    archive = tar_gz(files)
    urls = served(mirror, "simple-examples.tgz", archive)
    archives = {
        name: [
            archive_entry(name, content, [f"{mirror.url}/dead/{name}"]),
            archive_entry("simple-examples.tgz", archive, urls),
        ]
        for name, content in PTB_ARCHIVES.items()
    }
    catalogue = catalogue_with("ptb", archives=archives)
    corpus = prepare("ptb", tmp_path / "data", progress=False, catalogue=catalogue)
    for split in ("train", "valid", "test"):
        raw = (corpus.directory / "raw" / f"{split}.en").read_text(encoding="utf-8")
        assert raw == PTB_TEXT[f"ptb.{split}.txt"]
    assert mirror.requests.count("/new/simple-examples.tgz") == 1


def test_wikitext103(run) -> None:
    texts = {
        "train": " \n = A Title = \n \n a <unk> word @-@ list \u2013 a \n" * 5,
        "valid": " \n = B = \n",
        "test": " a \n \n b \n",
    }
    archive = zip_file({f"wikitext-103/wiki.{s}.tokens": text for s, text in texts.items()})
    corpus = run("wikitext103", {"wikitext-103": ("wikitext-103-v1.zip", archive)})
    for split, text in texts.items():
        assert (corpus.directory / "raw" / f"{split}.en").read_text(encoding="utf-8") == text
        assert corpus.sentences(split) == text.count("\n")  # blank lines count ...
        assert corpus.words(split) == len(text.split())
        assert corpus.tokens(split) == corpus.words(split) + text.count("\n")  # ... as one token
    assert corpus.bpe is None


WMT_PARTS = {
    "europarl-v7": "training/europarl-v7.de-en",
    "commoncrawl": "commoncrawl.de-en",
    "news-commentary-v12": "training/news-commentary-v12.de-en",
    "news-commentary-v9": "training/news-commentary-v9.de-en",
}


def wmt_pairs(part: str) -> list[tuple[str, str]]:
    """English and German of one part, 150 pairs with the filters' borderline cases."""
    words = [" ".join(["Wort"] * length) for length in range(260)]
    pairs = [
        (f"{part} \u201eYes\u201c, well-known\rIt\u2019s.", f"{part} \u201eJa\u201c, EU-weit usw."),
        (words[80], words[80]),
        (words[81], words[80]),
        (words[9], words[1]),
        (words[10], words[1]),
        ("", "leer"),
        ("soft\u00adhyphen", "wei\u00adch"),
    ]
    return pairs + [(f"Line {n} of {part}", f"Zeile {n} von {part}") for n in range(143)]


def wmt_archives(news: str, suffix: str = "tgz") -> dict[str, tuple[str, bytes]]:
    pack = {"tgz": tar_gz, "zip": zip_file}[suffix]
    archives = {}
    for part in ("europarl-v7", "commoncrawl", news):
        columns = zip(*wmt_pairs(part), strict=True)
        members = {
            f"{WMT_PARTS[part]}.{language}": "".join(f"{text}\n" for text in column)
            for language, column in zip(("en", "de"), columns, strict=True)
        }
        archives[part] = (f"{part}.{suffix}", pack(members))
    dev = {f"dev/newstest2013.{lang}": f"Dev-Set {lang}\n\n" for lang in ("en", "de")}
    segments = '<refset>\n<seg id="1">It\u2019s \u201eX-Y\u201c &amp; usw.</seg>\n'
    names = ("newstest2014-deen-src.en.sgm", "newstest2014-deen-ref.de.sgm")
    archives["newstest2013"] = (f"dev.{suffix}", pack(dev))
    archives["newstest2014"] = (
        "test-full.tgz",
        tar_gz({f"test-full/{name}": segments for name in names}),
    )
    return archives


@pytest.mark.parametrize("suffix", ["tgz", "zip"])
def test_wmt14_as_the_authors_prepared_it(run, suffix: str) -> None:
    corpus = run("wmt14", wmt_archives("news-commentary-v12", suffix), bpe_merges=60)
    parts = ("europarl-v7", "commoncrawl", "news-commentary-v12")
    train = split_lines(corpus, "text/tokenized", "train")
    raw = [pair for part in parts for pair in wmt_pairs(part)]
    assert split_lines(corpus, "raw", "train") == raw  # a lone CR ends no line
    assert corpus.manifest["splits"]["train"]["raw_sentences"] == 3 * 150
    assert train[0] == (
        "europarl @-@ v7 &quot; Yes , &quot; well @-@ knownIt &apos;s .",
        "europarl @-@ v7 &quot; Ja &quot; , EU @-@ weit usw .",
    )
    # Dropped in each part: 81 words, a ratio of 10, an empty side.
    assert len(train) == 3 * (150 - 3)
    assert ("soft hyphen", "wei ch") in train
    assert (" ".join(["Wort"] * 9), "Wort") in train
    assert split_lines(corpus, "text/tokenized", "valid") == [
        ("Dev @-@ Set en", "Dev @-@ Set de"),
        ("", ""),
    ]
    test = "&apos;s „ X @-@ Y “ &amp; amp ; usw ."
    assert split_lines(corpus, "text/tokenized", "test") == [
        (f"It {test}", f"It &apos; {test.removeprefix('&apos;')}")
    ]
    assert (corpus.source_language, corpus.target_language, corpus.lowercase) == ("en", "de", False)


@pytest.mark.parametrize(
    ("name", "news"),
    [("wmt14_fairseq", "news-commentary-v12"), ("wmt14_icml17", "news-commentary-v9")],
)
def test_wmt14_as_fairseq_prepares_it(run, name: str, news: str) -> None:
    """The filter comes after BPE, so the kept lines follow from the codes that were learned."""
    archives = wmt_archives(news)
    if name == "wmt14_icml17":
        del archives["newstest2013"]  # nor is it looked for
    corpus = run(name, archives, bpe_merges=60)
    raw = [pair for part in ("europarl-v7", "commoncrawl", news) for pair in wmt_pairs(part)]
    assert split_lines(corpus, "raw", "train") == raw
    with (corpus.directory / "text" / "bpe.codes").open(encoding="utf-8") as codes:
        bpe = BPE(codes)
    expected = {"train": [], "valid": []}
    for number, (english, german) in enumerate(raw, 1):
        if "\r" in english or "\u00ad" in english:
            continue  # these lines are looked at in the other test
        texts = [text.replace("news-commentary", "news @-@ commentary").replace("-v", " @-@ v")
                 for text in (english, german)]  # fmt: skip
        lengths = sorted(len(bpe.process_line(text).split()) for text in texts)
        if lengths[0] >= 1 and lengths[1] <= 250 and 2 * lengths[1] <= 3 * lengths[0]:
            expected["train" if number % 100 else "valid"].append((*texts, german))
    for split, rows in expected.items():
        tokenized = split_lines(corpus, "text/tokenized", split)
        references = text_lines(corpus.raw_reference(split))
        segmented = split_lines(corpus, "text/bpe", split)
        assert len(tokenized) == len(references) == len(segmented) == corpus.sentences(split)
        found = [(*pair, reference) for pair, reference in zip(tokenized, references, strict=True)]
        assert [row for row in found if "soft" not in row[0] and "Yes" not in row[0]] == rows
        for pair, pieces in zip(tokenized, segmented, strict=True):
            assert tuple(map(bpe.process_line, pair)) == pieces
    assert 0 < len(expected["valid"]) < 5
    assert len(expected["train"]) < 0.97 * len(raw)


def test_archives_are_shared_between_variants(catalogue_with, tmp_path) -> None:
    """wmt14_fairseq finds what wmt14 has downloaded, and does without the set it does not use."""
    files = wmt_archives("news-commentary-v12")
    folder = tmp_path / "data" / "wmt14" / "archives"
    folder.mkdir(parents=True)
    for file, content in files.values():
        if file != "dev.tgz":
            (folder / file).write_bytes(content)
    entries = {key: [archive_entry(*file)] for key, file in files.items()}
    catalogue = catalogue_with("wmt14_fairseq", archives=entries, bpe_merges=60)
    corpus = prepare("wmt14_fairseq", tmp_path / "data", progress=False, catalogue=catalogue)
    assert corpus.directory == Path(tmp_path / "data" / "wmt14_fairseq")
    assert not (corpus.directory / "archives").exists()
