"""Comparison of a prepared corpus with what the catalogue expects of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normexp.corpora.catalogue import Corpus
from normexp.corpora.hashing import file_hash


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
