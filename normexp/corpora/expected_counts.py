"""Comparison of a prepared corpus with what the catalogue expects of it.

Every stage is made from the one before it, so one wrong file makes everything after it differ. The
differences that no earlier one explains are told apart from those that follow from them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from normexp.corpora.catalogue import CLEAN, STEP_TEXTS, Corpus
from normexp.corpora.hashing import file_hash
from normexp.corpora.text import CODES, SEGMENTED, TOKENIZED


@dataclass(frozen=True)
class Comparison:
    """One expected value and the one obtained (None if there is none)."""

    quantity: str
    expected: Any
    obtained: Any
    cause: str  # of a difference, where it is known

    @property
    def agrees(self) -> bool:
        """Whether the value is the expected one."""
        return self.expected == self.obtained

    def __str__(self) -> str:
        cause = f" ({self.cause})" if self.cause else ""
        return f"{self.quantity}: {self.obtained} instead of {self.expected}{cause}"


def compare(corpus: Corpus, manifest: dict, directory: Path) -> list[Comparison]:
    """Compare every expected value of the catalogue with that of the corpus in `directory`."""
    expected = {
        "splits": corpus.expected.splits,
        "dictionary_types": corpus.expected.dictionary_types,
        "members": corpus.expected.members,
    }
    pairs = [(".".join(keys), value, _at(manifest, keys)) for keys, value in _leaves(expected)]
    for path, value in corpus.expected.hashes.items():
        pairs.append((path, value, _hash(manifest, directory, path, value.partition(":")[0])))
    return [Comparison(*pair, cause=_cause(corpus, pair[0], pair[2])) for pair in pairs]


def first_differences(corpus: Corpus, comparisons: list[Comparison]) -> list[Comparison]:
    """The differences that no difference of an earlier stage explains, earliest stage first."""
    differing = [comparison for comparison in comparisons if not comparison.agrees]
    places = [_place(corpus, comparison.quantity) for comparison in differing]
    first = [
        (place.stage, number)
        for number, place in enumerate(places)
        if not any(place.is_made_from(other) for other in places)
    ]
    return [differing[number] for _, number in sorted(first)]


def explain(corpus: Corpus, comparisons: list[Comparison]) -> list[str]:
    """Say what differs first, which causes are known, and how many differences follow."""
    first = first_differences(corpus, comparisons)
    differing = [comparison for comparison in comparisons if not comparison.agrees]
    lines = []
    for one in first:
        stage = _place(corpus, one.quantity).stage
        meaning = _MEANINGS.get(stage, "cause not known; this step comes first among what differs")
        lines.append(str(replace(one, cause=one.cause or meaning)))
    known = [one for one in differing if one.cause and one not in first]
    for cause in dict.fromkeys(one.cause for one in known):
        values = [str(replace(one, cause="")) for one in known if one.cause == cause]
        lines.append(f"{', '.join(values)} ({cause})")
    if following := len(differing) - len(first):
        lines.append(f"{following} more values differ, of what is made from these")
    return lines


_RAW, _STEPS, _TOKENIZED, _CODES, _SEGMENTED, _DICTIONARY, _BINARY = 1, 2, *range(100, 105)
_MEANINGS = {
    0: "the file in the archive is not the published one",
    _RAW: "the raw text is not the published one",
    _TOKENIZED: "cause not known; the text steps come first among what differs",
    _CODES: "cause not known; learning BPE comes first among what differs",
    _SEGMENTED: "cause not known; applying BPE comes first among what differs",
    _DICTIONARY: "cause not known; the dictionary comes first among what differs",
    _BINARY: "cause not known; the binarized data come first among what differs",
}


@dataclass(frozen=True)
class _Place:
    """Where in the preparation a quantity arises.

    split: None for codes and dictionaries, which are made from train and used for every split.
    language: None where the languages of a pair have been joined, by a filter of pairs.
    """

    stage: int
    split: str | None
    language: str | None

    def is_made_from(self, other: "_Place") -> bool:
        """Whether a difference at the other place explains one here."""
        if self.stage <= other.stage or (
            self.language and other.language and self.language != other.language
        ):
            return False
        if other.split in (None, self.split):
            return True
        return other.split == "train" and (self.split is None or self.stage >= _SEGMENTED)


def _place(corpus: Corpus, quantity: str) -> _Place:
    if quantity.startswith("members."):
        return _Place(0, *_readers(corpus)[quantity.removeprefix("members.")])
    if quantity.startswith("dictionary_types."):
        return _Place(_DICTIONARY, None, None)
    if quantity.startswith("splits."):
        _, split, count, *_ = quantity.split(".")
        held = _source_of(corpus, split)
        if count == "raw_sentences":
            return _Place(_RAW, held, None)
        if count in ("words", "sentences"):
            filtered = corpus.splits[split].after_bpe
            return _Place(_SEGMENTED if filtered else _TOKENIZED, held, None)
        return _Place(_BINARY, held, None)
    folder, _, name = quantity.rpartition("/")
    if name == CODES:
        return _Place(_CODES, None, None)
    if name.startswith("dict."):
        return _Place(_DICTIONARY, None, None)
    split, _, rest = name.partition(".")
    step, _, language = rest.rpartition(".")
    held = _source_of(corpus, split)
    steps = corpus.splits[held].steps if held in corpus.splits else []
    if folder == "raw":
        return _Place(_RAW, held, language)
    if folder == f"text/{STEP_TEXTS}":
        number = steps.index(step)
        joined = CLEAN in steps[: number + 1]
        return _Place(_STEPS + number, held, None if joined else language)
    if folder == f"text/{TOKENIZED}":
        joined = CLEAN in steps
        return _Place(_TOKENIZED, held, None if joined else language)
    return _Place(_SEGMENTED if folder == f"text/{SEGMENTED}" else _BINARY, held, None)


def _source_of(corpus: Corpus, split: str) -> str:
    """The split itself, or train if its lines are taken from there."""
    return "train" if split in corpus.splits and corpus.splits[split].every else split


def _readers(corpus: Corpus) -> dict[str, tuple[str, str]]:
    """``archive.member`` -> the split and language that are read from it."""
    return {
        f"{archive}.{member}": (split, language)
        for split, recipe in corpus.splits.items()
        for part in recipe.parts
        for language, (archive, member) in zip(
            corpus.languages, part.sources(corpus.languages), strict=True
        )
    }


def _hash(manifest: dict, directory: Path, path: str, algorithm: str) -> str | None:
    if path not in manifest["files"]:
        return None
    if algorithm == "sha256":
        return f"sha256:{manifest['files'][path]['sha256']}"
    return f"{algorithm}:{file_hash(directory / path, algorithm)}"


def _leaves(tree: dict, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*keys, key))
        else:
            yield (*keys, key), value


def _at(tree: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _cause(corpus: Corpus, quantity: str, obtained: Any) -> str:
    for known in corpus.known_deviations:
        if known.quantity == quantity and known.value == obtained:
            return known.cause
    return ""
