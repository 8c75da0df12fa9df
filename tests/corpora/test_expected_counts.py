"""What differs first: a wrong file makes everything after it differ, and only it is to blame."""

import copy
import io
from pathlib import Path

import pytest
from rich.console import Console

from normexp.corpora.catalogue import load_catalogue
from normexp.corpora.expected_counts import compare, explain, first_differences
from normexp.corpora.prepared import PreparedCorpus
from normexp.corpora.summary import print_summary

CORPUS = load_catalogue()["iwslt14"]
MEMBER = "members.de-en.train.tags.de-en.de"


def as_expected() -> dict:
    """The manifest of an iwslt14 that came out as published; all hashes as sha256."""
    expected = CORPUS.expected
    for path, value in expected.hashes.items():
        assert path and value
    return copy.deepcopy(
        {
            "splits": expected.splits,
            "dictionary_types": expected.dictionary_types,
            "members": expected.members,
            "files": {},
        }
    )


@pytest.fixture
def hashes(monkeypatch) -> dict[str, str]:
    """Hashes that the prepared files seem to have; the expected ones at first."""
    found = dict(CORPUS.expected.hashes)
    monkeypatch.setattr(
        "normexp.corpora.expected_counts._hash", lambda manifest, folder, path, _: found[path]
    )
    return found


def differ(hashes: dict[str, str], *parts: str) -> None:
    """Change the hashes of all files that have one of the parts in their names."""
    for path in hashes:
        if any(part in path for part in parts):
            hashes[path] = "sha256:0"


def first(manifest: dict) -> list[str]:
    comparisons = compare(CORPUS, manifest, Path())
    return [comparison.quantity for comparison in first_differences(CORPUS, comparisons)]


def test_nothing_differs(hashes) -> None:
    assert first(as_expected()) == [] == explain(CORPUS, compare(CORPUS, as_expected(), Path()))


def test_a_member_of_the_archive_explains_all_that_is_made_from_it(hashes) -> None:
    manifest = as_expected()
    manifest["members"]["de-en"]["train.tags.de-en.de"] = "git_blob:0"
    differ(hashes, ".de", "train.clean", "train.lowercase", "train.en", "valid", "bpe", "data-bin")
    hashes["text/tokenized/test.de"] = CORPUS.expected.hashes["text/tokenized/test.de"]
    manifest["splits"]["train"] |= {"words": {"de": 1, "en": 1}, "tokens": {"de": 1, "en": 1}}
    manifest["splits"]["test"]["tokens"] = {"de": 1, "en": 1}
    assert first(manifest) == [MEMBER]
    told = explain(CORPUS, compare(CORPUS, manifest, Path()))
    assert len(told) == 2 and "the file in the archive is not the published one" in told[0]
    assert told[1].endswith("more values differ, of what is made from these")


@pytest.mark.parametrize(
    ("also", "quantity"),
    [
        ("text/steps/train.tokenize.en", "text/steps/train.tokenize.en"),  # another language
        ("text/tokenized/test.de", "text/tokenized/test.de"),  # another file
    ],
)
def test_a_member_explains_nothing_that_is_made_without_it(hashes, also, quantity) -> None:
    manifest = as_expected()
    manifest["members"]["de-en"]["train.tags.de-en.de"] = "git_blob:0"
    differ(hashes, "train.tokenize.de", "train.clean", "bpe", also)
    assert first(manifest) == [MEMBER, quantity]


@pytest.mark.parametrize(
    ("parts", "quantities"),
    [
        (("train.clean", "train.lowercase", "bpe"), ["clean.de", "clean.en"]),
        (("bpe.codes", "bpe/", "dict.", ".bin"), ["bpe.codes"]),
        (("bpe/test", "test.de-en"), ["bpe/test.de", "bpe/test.en"]),
        (("dict.", ".bin"), ["dict.de.txt", "dict.en.txt"]),
        (("valid.de-en.de.bin",), ["valid.de-en.de.bin"]),
        (("tokenized/train", "tokenized/valid", "codes"), ["train.de", "train.en", "valid.de",
                                                           "valid.en"]),
    ],
    ids=["cleaning", "codes", "only the test set", "dictionary", "binary", "held-out lines"],
)  # fmt: skip
def test_the_earliest_stage_is_named(hashes, parts, quantities) -> None:
    differ(hashes, *parts)
    found = first(as_expected())
    assert len(found) == len(quantities)
    assert all(name.endswith(end) for name, end in zip(found, quantities, strict=True))


def test_known_causes_are_told_although_an_earlier_stage_differs(hashes) -> None:
    manifest = as_expected()
    differ(hashes, "train", "valid", "bpe", "data-bin")
    manifest["splits"]["train"]["sentences"] = 160_250
    manifest["splits"]["valid"]["sentences"] = 7_284
    told = explain(CORPUS, compare(CORPUS, manifest, Path()))
    assert [line.partition(":")[0] for line in told[:2]] == [
        "text/steps/train.tokenize.de",
        "text/steps/train.tokenize.en",
    ]
    assert "160250 instead of 160239" in told[2] and "7284 instead of 7283" in told[2]
    assert "Windows line ends" in told[2] and "more values" in told[3] and len(told) == 4


@pytest.mark.parametrize("width", [40, 80, 200])
def test_names_are_whole_at_every_width(hashes, width: int) -> None:
    manifest = as_expected()
    differ(hashes, "data-bin", "steps")
    for record in manifest["splits"].values():
        record.setdefault("raw_sentences", None)
        record.setdefault("unknown", {})
    out = io.StringIO()
    prepared = PreparedCorpus("iwslt14", Path("data/iwslt14"), manifest)
    print_summary(CORPUS, prepared, Console(file=out, width=width))
    cells = [line.split("│")[1].strip() for line in out.getvalue().split("\n") if "│" in line]
    names = "".join(cells)
    for comparison in compare(CORPUS, manifest, Path()):
        assert comparison.quantity.removeprefix("splits.") in names
    assert "…" not in names
    assert "train.tokenize.de: sha256:0 instead of git_blob:ad13a09b" in out.getvalue()
