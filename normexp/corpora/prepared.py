"""A prepared corpus, as training and evaluation see it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from normexp.corpora.text import REFERENCE
from normexp.errors import UserError, invalid_fields


@dataclass
class _Split:
    sentences: int
    words: dict[str, int]
    tokens: dict[str, int]


@dataclass
class _File:
    bytes: int
    sha256: str


@dataclass
class _Manifest:
    """What is read of a manifest; there is more."""

    fingerprint: str
    kind: Literal["translation", "language_model"]
    languages: list[str]
    bpe: str | None
    lowercase: bool
    splits: dict[str, _Split]
    dictionary_types: dict[str, int]
    members: dict[str, dict[str, str]]
    files: dict[str, _File]


_MANIFEST = TypeAdapter(_Manifest)


def defect_of_manifest(manifest: Any) -> str | None:
    """Name what is missing or of another type in a manifest; None where nothing is."""
    try:
        _MANIFEST.validate_json(json.dumps(manifest), strict=True)
    except ValidationError as error:
        return invalid_fields(error)
    return None


@dataclass
class _Digest:
    sha256: str


@dataclass
class RecordedCorpus:
    """What is read of `PreparedCorpus.for_record`; there is more."""

    name: str
    hashes: dict[str, _Digest]
    test_sets: dict[str, "RecordedCorpus"] = field(default_factory=dict)


_RECORDED = TypeAdapter(RecordedCorpus)


def recorded_corpus(content: Any) -> RecordedCorpus:
    """Read what `PreparedCorpus.for_record` gave. Raises UserError naming what is damaged."""
    try:
        return _RECORDED.validate_python(content)
    except ValidationError as error:
        raise UserError(f"corpus of the record: {invalid_fields(error)}") from None


@dataclass(frozen=True)
class PreparedCorpus:
    """A corpus on disk, ready for fairseq.

    `manifest` holds tool versions, counts per split and the hash of every file, and nothing about
    the machine, so equal manifests mean equal corpora. `test_sets` has further test sets by name,
    each prepared in a folder of its own.
    """

    name: str
    directory: Path
    manifest: dict = field(repr=False)
    test_sets: Mapping[str, "PreparedCorpus"] = field(default_factory=dict, repr=False)

    @property
    def kind(self) -> str:
        """ "translation" or "language_model"."""
        return self.manifest["kind"]

    @property
    def data_bin(self) -> Path:
        """The folder for fairseq's `task.data`."""
        return self.directory / "data-bin"

    def data_bin_of(self, split: str) -> Path:
        """The folder for fairseq's `task.data` in which a split lies."""
        return self._owner(split).data_bin

    @property
    def source_language(self) -> str | None:
        """Code of the language; None for a language model."""
        return self.manifest["languages"][0] if self.kind == "translation" else None

    @property
    def target_language(self) -> str | None:
        """Code of the language; None for a language model."""
        return self.manifest["languages"][1] if self.kind == "translation" else None

    @property
    def bpe(self) -> str | None:
        """fairseq's name of the BPE that made the tokens, None if tokens are words."""
        return self.manifest["bpe"]

    @property
    def text(self) -> str:
        """What remains when the pieces are joined, which decides how BLEU is computed.

        "moses": tokenized by Moses's rules from the raw reference; "tokenized": the user's own
        tokens, of which the raw reference consists, too; "plain": untokenized text.
        """
        return self.manifest.get("text", "moses")  # corpora prepared before there were others

    @property
    def lowercase(self) -> bool:
        """Whether the text was lowercased, so that scores against raw text must ignore case."""
        return self.manifest["lowercase"]

    def raw_reference(self, split: str) -> Path:
        """Untokenized target text, one sentence per line, in the order of the binarized data.

        For sacreBLEU. Raises ValueError for a language model or an unknown split.
        """
        owner = self._owner(split)
        if self.kind != "translation":
            raise ValueError(f"{self.name} is a language model's corpus and has no references")
        return owner.directory / "text" / REFERENCE / f"{split}.{self.target_language}"

    def for_record(self) -> dict:
        """Names, hashes of all files and counts, those of the further test sets included."""
        described = {
            "name": self.name,
            "hashes": self.manifest["files"],
            "counts": self.manifest["splits"],
        }
        if self.test_sets:
            described["test_sets"] = {
                name: test_set.for_record() for name, test_set in self.test_sets.items()
            }
        return described

    def difference_from(self, recorded: "RecordedCorpus") -> str | None:
        """Name a file that is other than in a record; None where all that both know are equal."""
        for name, known in self.manifest["files"].items():
            digest = recorded.hashes[name].sha256 if name in recorded.hashes else known["sha256"]
            if digest != known["sha256"]:
                return (
                    f"{self.directory / name} is not the file that the record was made with: "
                    f"SHA-256 {known['sha256'][:12]}..., recorded {digest[:12]}..."
                )
        further = (
            test_set.difference_from(recorded.test_sets[name])
            for name, test_set in self.test_sets.items()
            if name in recorded.test_sets
        )
        return next(filter(None, further), None)

    def sentences(self, split: str) -> int:
        """Sentence pairs, or lines of a language model's corpus (blank ones included)."""
        return self._split(split)["sentences"]

    def words(self, split: str, language: str | None = None) -> int:
        """Words before BPE, without end-of-sentence; of the target language by default."""
        return self._split(split)["words"][self._language(language)]

    def tokens(self, split: str, language: str | None = None) -> int:
        """Tokens as binarized, one end-of-sentence per sentence included; target by default."""
        return self._split(split)["tokens"][self._language(language)]

    def _split(self, split: str) -> dict:
        return self._owner(split).manifest["splits"][split]

    def _owner(self, split: str) -> "PreparedCorpus":
        if split in self.manifest["splits"]:
            return self
        if split not in self.test_sets:
            known = ", ".join([*self.manifest["splits"], *self.test_sets])
            raise ValueError(f"{self.name} has no split {split!r}, only {known}")
        return self.test_sets[split]

    def _language(self, language: str | None) -> str:
        languages = self.manifest["languages"]
        if language is not None and language not in languages:
            raise ValueError(f"{self.name} has no language {language!r}, only {languages}")
        return language or languages[-1]
