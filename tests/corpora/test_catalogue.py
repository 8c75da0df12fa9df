"""The catalogue of corpora: every entry is complete, and mistakes in it are named."""

import re
from pathlib import Path

import pytest
import yaml

from normexp.corpora import available_corpora
from normexp.corpora.catalogue import CATALOGUE, load_catalogue
from normexp.corpora.expected_counts import compare
from normexp.errors import UserError

CORPORA = load_catalogue()
TASKS = Path(__file__).parents[2] / "configs" / "task"


def test_every_task_has_its_corpus() -> None:
    tasks = [yaml.safe_load(path.read_text(encoding="utf-8"))["task"] for path in TASKS.glob("*")]
    assert tasks
    for task in tasks:
        assert CORPORA[task["corpus"]].kind == task["kind"]
    assert available_corpora() == list(CORPORA)


@pytest.mark.parametrize("corpus", CORPORA.values(), ids=CORPORA)
def test_sources_are_documented(corpus) -> None:
    assert corpus.licence and corpus.description
    if not corpus.generator:
        assert corpus.disk_space > 0
        assert corpus.used_archives() <= set(corpus.archives)
    for archive in (file for files in corpus.archives.values() for file in files):
        assert archive.urls
        assert all(url.startswith(("http://", "https://")) for url in archive.urls)
        assert archive.verified or archive.hash_source


@pytest.mark.parametrize("corpus", CORPORA.values(), ids=CORPORA)
def test_expected_counts_agree_with_each_other(corpus) -> None:
    """Tokens of a word-level corpus are its words and one end of sentence per line."""
    for counts in corpus.expected.splits.values():
        if not corpus.bpe_merges and "tokens" in counts:
            for language, words in counts["words"].items():
                assert counts["tokens"][language] == words + counts["sentences"]
    every = corpus.splits["valid"].every
    counts = corpus.expected.splits
    if every and not corpus.splits["valid"].after_bpe and counts:
        clean = counts["train"]["sentences"] + counts["valid"]["sentences"]
        assert counts["valid"]["sentences"] == clean // every


def test_expected_members_are_read_by_the_recipe() -> None:
    for corpus in CORPORA.values():
        read = {
            (archive, member)
            for split in corpus.splits.values()
            for part in split.parts
            for archive, member in part.sources(corpus.languages)
        }
        for archive, members in corpus.expected.members.items():
            assert {(archive, member) for member in members} <= read


def test_expected_step_texts_are_made_by_the_recipe() -> None:
    corpus = CORPORA["iwslt14"]
    assert corpus.kept_step_texts == {
        f"train.{step}.{language}"
        for step in corpus.splits["train"].steps
        for language in corpus.languages
    }


WINDOWS, DOTS = "Windows line ends in Moses's nonbreaking_prefix files", "final dots kept"


@pytest.mark.parametrize(
    ("name", "quantity", "value", "cause"),
    [
        ("iwslt14", "splits.train.sentences", 160_250, WINDOWS),
        ("iwslt14", "splits.valid.sentences", 7_284, WINDOWS),
        ("iwslt14", "splits.test.words.de", 125_796, WINDOWS),
        ("iwslt14", "splits.test.words.en", 131_185, WINDOWS),
        ("iwslt14", "splits.valid.tokens.de", 185_522, WINDOWS),
        ("iwslt14", "splits.train.sentences", 160_215, DOTS),
        ("iwslt14", "splits.valid.sentences", 7_282, DOTS),
        ("iwslt14", "splits.test.words.de", 125_738, DOTS),
        ("iwslt14", "dictionary_types.en", 6_632, "a dictionary for each language"),
        ("iwslt14_separate", "splits.train.sentences", 160_250, WINDOWS),
        ("wikitext103", "splits.valid.tokens.en", 216_347, "blank lines were left out"),
        ("wmt14_fairseq", "splits.train.sentences", 3_960_793, "March 2018"),
        ("multi30k", "splits.train.words.de", 360_706, "dot of a line's last word was kept"),
    ],
)
def test_known_differences_are_explained(name, quantity, value, cause, tmp_path) -> None:
    manifest: dict = {"files": {}}
    *path, last = quantity.split(".")
    record = manifest
    for key in path:
        record = record.setdefault(key, {})
    record[last] = value
    found = {str(c): c for c in compare(CORPORA[name], manifest, tmp_path)}
    text = next(text for text, c in found.items() if c.quantity == quantity)
    assert re.fullmatch(rf"{quantity}: {value} instead of \d+ \(.*{cause}.*\)", text), text


def changed(tmp_path, change: dict) -> Path:
    """A catalogue whose entry multi30k is changed."""
    entry = yaml.safe_load(CATALOGUE.read_text(encoding="utf-8"))["corpora"]["multi30k"]
    path = tmp_path / "catalogue.yaml"
    path.write_text(yaml.safe_dump({"corpora": {"multi30k": entry | change}}), encoding="utf-8")
    return path


TEST = {"parts": [{"members": {"de": "val.de", "en": "val.en"}}]}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"bpe_mergers": 1}, "bpe_mergers: Extra inputs"),
        ({"bpe_merges": "many"}, "bpe_merges: .*integer"),
        ({"kind": "summarization"}, "kind: .*'translation' or 'language_model'"),
        ({"languages": ["de"]}, "1 languages do not fit kind translation"),
        ({"splits": {"train": TEST, "test": TEST}}, "splits: .*at least 3"),
        ({"splits": {"train": {}, "valid": TEST, "test": TEST}}, "splits.train: neither parts"),
        ({"splits": {"train": {"every": 2}, "valid": TEST, "test": TEST}}, "splits.train: `every`"),
        (
            {"splits": {"train": TEST | {"steps": ["tokenise"]}, "valid": TEST, "test": TEST}},
            "splits.train.steps.0: .*'tokenize'",
        ),
        (
            {"splits": {"train": TEST | {"steps": ["clean"]}, "valid": TEST, "test": TEST}},
            "splits.train: step clean needs the limits",
        ),
        (
            {"splits": dict.fromkeys(("train", "valid", "test"), TEST), "archives": {}},
            "splits.test: archive 'val.de' is not under `archives`",
        ),
        (
            {"archives": {"val.de": [{"file": "val.de.gz", "hash": "crc32:12"}]}},
            "archives.val.de.0.hash: .*pattern",
        ),
        ({"archives": {"val.de": []}}, "archives: a list of files is empty"),
        ({"expected": {"hashes": {"raw/train.de": "sha1"}}}, "expected.hashes: .*raw/train.de"),
        ({"expected": {"members": {"a": {"b": "md5:x"}}}}, "expected.members: .*b: 'md5:x'"),
    ],
)
def test_mistakes_are_named(tmp_path, change: dict, named: str) -> None:
    with pytest.raises(UserError, match=rf"catalogue.yaml, multi30k(\.|: ){named}"):
        load_catalogue(changed(tmp_path, change))


@pytest.mark.parametrize("content", ["corpora: [", "corpus: {}", "", "corpora: 3"])
def test_unreadable_catalogue(tmp_path, content: str) -> None:
    path = tmp_path / "catalogue.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="cannot read the catalogue"):
        load_catalogue(path)


def test_fingerprint_covers_the_recipe_and_nothing_else(tmp_path) -> None:
    before = CORPORA["multi30k"].fingerprint()

    def after(change: dict) -> str:
        return load_catalogue(changed(tmp_path, change))["multi30k"].fingerprint()

    archives = CORPORA["multi30k"].model_dump()["archives"]
    for file in archives["train.de"]:
        file["urls"] = ["http://127.0.0.1/elsewhere"]
    same = {"licence": "?", "disk_space": 1, "expected": {}, "archives": archives}
    assert after(same) == before
    archives["train.de"][0]["hash"] = "md5:" + "0" * 32
    for change in ({"bpe_merges": 17}, {"joined_dictionary": False}, {"archives": archives}):
        assert after(change) != before
