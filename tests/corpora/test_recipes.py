"""The recipes of the large corpora, on small archives of the real layout."""

from pathlib import Path

import pytest
from stand_ins import archive_entry, local_folder, tar_gz, text_lines, zip_file
from subword_nmt.apply_bpe import BPE

from normexp.corpora import PreparedCorpus, prepare

FILES = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")


@pytest.fixture
def run(tmp_path, catalogue_with):
    """Prepares a corpus of the catalogue from the given archives, file name to content."""

    def run_(name: str, archives: dict[str, tuple[str, bytes]], **replaced) -> PreparedCorpus:
        files = dict(archives.values())
        entries = {key: [archive_entry(file, files[file])] for key, (file, _) in archives.items()}
        catalogue = catalogue_with(name, archives=entries, **replaced)
        local = local_folder(tmp_path / "local", files)
        return prepare(name, tmp_path / "data", local, progress=False, catalogue=catalogue)

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
    ]  # fmt: skip
    pairs += [(f"Satz {n} A", f"Line {n} B", (f"satz {n} a", f"line {n} b")) for n in range(60)]
    members = {
        "de-en/train.tags.de-en.de": "".join(f"{german}\n" for german, _, _ in pairs),
        "de-en/train.tags.de-en.en": "".join(f"{english}\n" for _, english, _ in pairs),
        "de-en/train.en": "not read\n",
    }
    for file in FILES:
        for language in ("de", "en"):
            segments = f'<seg id="1"> {file} It\u2019s A </seg>\n<p>\n<seg id="2">B</seg>\n'
            members[f"de-en/IWSLT14.{file}.de-en.{language}.xml"] = f"<doc>\n{segments}</doc>\n"
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
    for file, (german, english) in zip(FILES, test[::2], strict=True):
        assert german == f"{file.lower()} it &apos; s a"
        assert english == f"{file.lower()} it &apos;s a"
    assert text_lines(corpus.raw_reference("test"))[0] == "TED.dev2010 It\u2019s A"
    dictionaries = [(corpus.data_bin / f"dict.{lang}.txt").read_bytes() for lang in ("de", "en")]
    assert dictionaries[0] == dictionaries[1]
    assert corpus.lowercase


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


def wmt_archives(news: str) -> dict[str, tuple[str, bytes]]:
    archives = {}
    for part in ("europarl-v7", "commoncrawl", news):
        columns = zip(*wmt_pairs(part), strict=True)
        members = {
            f"{WMT_PARTS[part]}.{language}": "".join(f"{text}\n" for text in column)
            for language, column in zip(("en", "de"), columns, strict=True)
        }
        archives[part] = (f"{part}.tgz", tar_gz(members))
    dev = {f"dev/newstest2013.{lang}": f"Dev-Set {lang}\n\n" for lang in ("en", "de")}
    segments = '<refset>\n<seg id="1">It\u2019s \u201eX-Y\u201c &amp; usw.</seg>\n'
    names = ("newstest2014-deen-src.en.sgm", "newstest2014-deen-ref.de.sgm")
    archives["newstest2013"] = ("dev.tgz", tar_gz(dev))
    archives["newstest2014"] = (
        "test-full.tgz",
        tar_gz({f"test-full/{name}": segments for name in names}),
    )
    return archives


def test_wmt14_as_the_authors_prepared_it(run) -> None:
    corpus = run("wmt14", wmt_archives("news-commentary-v12"), bpe_merges=60)
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
