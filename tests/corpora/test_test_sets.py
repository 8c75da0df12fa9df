"""Test sets besides `test`: made when asked for, with the codes and dictionaries of the corpus."""

from pathlib import Path

import pytest
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDataset
from support.small_runs import SMALL, composed
from support.stand_ins import archive_entry, gzipped, local_folder, text_lines

from normexp import pipeline
from normexp.corpora import prepare
from normexp.corpora.catalogue import load_catalogue
from normexp.errors import UserError
from normexp.evaluation import reevaluation

NAMES = ("train", "val", "test_2016_flickr", "test_2017_flickr", "test_2018_flickr")
NOUNS = ("Hund", "dog"), ("Mann", "man"), ("Ball", "ball"), ("Hut", "hat")


def text(name: str) -> dict[str, str]:
    """Made-up sentences: 2018 has those of 2016, 2017 has a word of its own."""
    number = {"train": 80, "val": 7, "test_2017_flickr": 5}.get(name, 6)
    word = "Zug " if name == "test_2017_flickr" else ""
    pairs = [
        (f"Ein {word}{NOUNS[n % 4][0]} mit {n % 7} Nrn.", f"A {NOUNS[n % 4][1]} of {n % 7} nos.")
        for n in range(number)
    ]
    german, english = zip(*pairs, strict=True)
    return {"de": "\n".join(german) + "\n", "en": "\n".join(english) + "\n"}


TEXTS = {f"{name}.{language}": lines for name in NAMES for language, lines in text(name).items()}


@pytest.fixture
def multi30k(tmp_path, catalogue_with):
    """multi30k(*splits, without=(), **replaced): made-up Multi30k, evaluated on the splits."""
    files = {f"{name}.gz": gzipped(lines.encode()) for name, lines in TEXTS.items()}
    local = local_folder(tmp_path / "local", files)
    archives = {
        name.removesuffix(".gz"): [archive_entry(name, content)] for name, content in files.items()
    }
    test_sets = {
        f"test_{year}_flickr": {
            "parts": [{"members": {one: f"test_{year}_flickr.{one}" for one in ("de", "en")}}],
            "steps": ["lowercase", "tokenize"],
        }
        for year in (2017, 2018)
    }

    def write(**replaced) -> Path:
        recipe = {"archives": archives, "bpe_merges": 30, "test_sets": test_sets}
        return catalogue_with("multi30k", **(recipe | replaced))

    def prepared(*splits: str, **replaced):
        catalogue = write(**replaced)
        return prepare("multi30k", tmp_path / "data", local, False, catalogue, splits=splits)

    prepared.catalogue, prepared.local, prepared.test_sets = write, local, test_sets
    return prepared


def test_is_made_only_where_it_is_asked_for(multi30k) -> None:
    for file in multi30k.local.glob("test_2017*"):
        file.unlink()
    corpus = multi30k("valid", "test")
    assert not corpus.test_sets and not (corpus.directory / "test_sets").exists()
    assert multi30k("test", "test_2018_flickr").sentences("test_2018_flickr") == 6
    with pytest.raises(UserError, match="test_2017_flickr"):
        multi30k("test_2017_flickr")


def test_is_binarized_with_the_corpus_and_leaves_it_alone(multi30k) -> None:
    before = multi30k()
    corpus = multi30k("test_2017_flickr")
    assert corpus.manifest == before.manifest == multi30k().manifest
    dictionary = Dictionary.load(str(corpus.data_bin / "dict.de.txt"))
    folder = corpus.data_bin_of("test_2017_flickr")
    assert folder == corpus.directory / "test_sets/test_2017_flickr/data-bin"
    assert corpus.data_bin_of("test") == corpus.data_bin
    # "Zug" is in pieces of one letter, of which the train text lacks some.
    data = MMapIndexedDataset(str(folder / "test_2017_flickr.de-en.de"))
    pieces = text_lines(folder.parent / "text/bpe/test_2017_flickr.de")
    for ids, line in zip(data, pieces, strict=True):
        known = [piece if piece in dictionary.indices else "<unk>" for piece in line.split()]
        assert dictionary.string(ids) == " ".join(known)
        assert line.replace("@@ ", "").startswith("ein zug ")
    # The same text as test: the same numbers.
    corpus = multi30k("test_2018_flickr")
    for language in ("de", "en"):
        same = corpus.data_bin_of("test_2018_flickr") / f"test_2018_flickr.de-en.{language}.bin"
        assert same.read_bytes() == (corpus.data_bin / f"test.de-en.{language}.bin").read_bytes()
    assert corpus.words("test_2018_flickr") == corpus.words("test")
    assert (
        text_lines(corpus.raw_reference("test_2018_flickr"))
        == (TEXTS["test_2018_flickr.en"].split("\n")[:-1])
    )


def test_is_made_anew_when_its_recipe_or_the_corpus_changes(multi30k) -> None:
    def made(**replaced) -> tuple[int, int]:
        corpus = multi30k("test_2018_flickr", **replaced)
        files = (
            corpus.data_bin / "dict.de.txt",
            corpus.data_bin_of("test_2018_flickr") / "dict.de.txt",
        )
        return tuple(file.stat().st_ino for file in files)

    first = made()
    assert made() == first
    recipe = multi30k.test_sets["test_2018_flickr"] | {"steps": ["tokenize", "lowercase"]}
    second = made(test_sets={"test_2018_flickr": recipe})
    assert second[0] == first[0] and second[1] != first[1]
    third = made(test_sets={"test_2018_flickr": recipe}, bpe_merges=20)
    assert third[0] != second[0] and third[1] != second[1]


def test_expected_counts_are_enforced(multi30k) -> None:
    recipe = multi30k.test_sets["test_2018_flickr"]
    expected = {"enforced": True, "counts": {"words": {"de": 36}}}
    changed = {"test_2018_flickr": recipe | {"expected": expected}}
    assert multi30k("test_2018_flickr", test_sets=changed).words("test_2018_flickr", "de") == 36
    expected["counts"]["words"]["de"] = 37
    with pytest.raises(UserError, match=r"test_2018_flickr.words.de: 36 instead of 37"):
        multi30k("test_2018_flickr", test_sets=changed, bpe_merges=20)


def test_unknown_names_are_refused_before_anything_is_fetched(multi30k) -> None:
    for file in multi30k.local.iterdir():
        file.unlink()
    known = "no test_2071; known: valid, test, test_2017_flickr, test_2018_flickr"
    with pytest.raises(UserError, match=f"evaluation.splits: corpus multi30k has {known}"):
        multi30k("test", "test_2071")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"every": 3}, "a further test set has text of its own"),
        ({"parts": []}, "neither parts"),
        ({"steps": ["tokenise"]}, "'tokenize'"),
    ],
)
def test_mistakes_in_the_catalogue_are_named(multi30k, change: dict, named: str) -> None:
    recipe = multi30k.test_sets["test_2018_flickr"] | change
    with pytest.raises(UserError, match=rf"multi30k.*test_sets.test_2018_flickr.*{named}"):
        load_catalogue(multi30k.catalogue(test_sets={"test_2018_flickr": recipe}))


def test_a_run_is_evaluated_on_it(multi30k, tmp_path, monkeypatch, capsys) -> None:
    """A set with the text of `test` has its scores; `evaluate.py` takes other sets afterwards."""
    *others, _ = prepare.__defaults__
    monkeypatch.setattr(prepare, "__defaults__", (*others, multi30k.catalogue()))
    record = pipeline.run(
        composed(
            *("task=multi30k", "norm=batch", *SMALL["toy_translation"], "tracking=disabled"),
            *("fairseq.optimization.max_epoch=1", "evaluation.splits=[test,test_2018_flickr]"),
            *(f"data.local={multi30k.local}", f"data.dir={tmp_path / 'data'}"),
            f"results_dir={tmp_path / 'results'}",
        )
    )
    assert list(record.metrics) == ["test", "test_2018_flickr"]
    assert record.metrics["test"] == record.metrics["test_2018_flickr"]
    assert record.corpus["test_sets"]["test_2018_flickr"]["counts"].keys() == {"test_2018_flickr"}
    folder = tmp_path / "results/runs/multi30k/BN-seed1"
    hypotheses = folder / "hypotheses"
    assert (hypotheses / "test.txt").read_text() == (
        (hypotheses / "test_2018_flickr.txt").read_text()
    )
    capsys.readouterr()
    reevaluation.main(folder, ["evaluation.splits=[test_2017_flickr]"], fold=False)
    assert "test_2017_flickr" in capsys.readouterr().out
    assert len(text_lines(hypotheses / "test_2017_flickr.txt")) == 5
