"""The catalogue of corpora: the sources, the recipe and the expected results of each.

`data/catalogue.yaml` is the single description of every corpus; its keys are the fields of the
models below, so a misspelt or missing key is an error that names it.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from normexp.corpora.hashing import ALGORITHMS
from normexp.corpora.raw_text import FORMATS
from normexp.corpora.tokenization import STEPS
from normexp.errors import UserError
from normexp.files import read_yaml
from normexp.paths import REPOSITORY

CATALOGUE = REPOSITORY / "data" / "catalogue.yaml"
SPLITS = ("train", "valid", "test")
CLEAN = "clean"
STEP_TEXTS = "steps"  # folder of the text stage
HASH = rf"^({'|'.join(ALGORITHMS)}):[0-9a-f]+$"

SplitName = Literal["train", "valid", "test"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Archive(_Model):
    """One file to fetch. Interchangeable files (same texts, other container) form a list."""

    file: str
    urls: list[str] = []
    size: int | None = None  # bytes
    hash: str = Field(pattern=HASH)
    verified: bool = False  # True: recomputed from the bytes; False: as published by hash_source
    hash_source: str = ""


class Part(_Model):
    """Consecutive lines of a split: one text per language, the same number of lines in each."""

    members: dict[str, str]  # language -> name inside the archive
    archive: str | None = None  # None: every member is an archive (a plain or gzipped text)
    format: Literal[*FORMATS] = "lines"

    def sources(self, languages: list[str]) -> list[tuple[str, str]]:
        """(archive, member) of each language."""
        members = [self.members[language] for language in languages]
        return [(self.archive or member, member) for member in members]


class Split(_Model):
    """How one of train, valid and test is made."""

    parts: list[Part] = []
    every: int = 0  # n > 0: every n-th line of the train split (1-based), removed from there
    steps: list[Literal[*STEPS, CLEAN]] = []  # applied in this order, before BPE
    after_bpe: list[Literal[CLEAN]] = []


class Clean(_Model):
    """Limits of the `clean` step, see `normexp.corpora.cleaning`."""

    max_ratio: float
    min_words: int
    max_words: int


class Expected(_Model):
    """Expected results, compared leaf by leaf with the manifest."""

    enforced: bool = False  # a difference is an error rather than a warning
    splits: dict[SplitName, dict[str, Any]] = {}
    dictionary_types: dict[str, int] = {}
    members: dict[str, dict[str, str]] = {}  # archive -> member read from it -> its hash
    hashes: dict[str, str] = {}  # path below the corpus folder -> its hash

    @field_validator("members", "hashes")
    @classmethod
    def _hashes(cls, hashes: dict) -> dict:
        for name, value in hashes.items():
            if isinstance(value, dict):
                cls._hashes(value)
            elif not re.fullmatch(HASH, value):
                raise ValueError(f"{name}: {value!r} is not ALGORITHM:DIGEST")
        return hashes


class KnownDeviation(_Model):
    """A wrong value that has been seen before, and its cause."""

    quantity: str  # such as "splits.valid.sentences"
    value: Any
    cause: str


class Corpus(_Model):
    """One entry of the catalogue."""

    name: str
    kind: Literal["translation", "language_model"]
    languages: list[str]  # source, target; or the one language of a language model
    splits: dict[SplitName, Split] = Field(min_length=len(SPLITS))
    description: str
    licence: str
    homepage: str = ""
    generator: str | None = None  # module in normexp.corpora with generate(seed, sizes)
    seed: int = 0
    sizes: dict[SplitName, int] = {}  # lines per split, for a generator
    archives: dict[str, list[Archive]] = {}
    archives_of: str | None = None  # use the archive folder of another corpus
    disk_space: int = 0  # bytes needed in all
    clean: Clean | None = None
    bpe_merges: int = 0  # 0: no BPE
    joined_dictionary: bool = False
    expected: Expected = Expected()
    known_deviations: list[KnownDeviation] = []

    def fingerprint(self) -> str:
        """Hash of everything that decides the prepared bytes, and of nothing else."""
        recipe = self.model_dump(
            mode="json",
            exclude={
                "name": True, "description": True, "licence": True, "homepage": True,
                "archives_of": True, "disk_space": True, "expected": True,
                "known_deviations": True,
                "archives": {"__all__": {"__all__": {"urls", "size", "verified", "hash_source"}}},
            },
        )  # fmt: skip
        used = self.used_archives()
        recipe["archives"] = {key: recipe["archives"][key] for key in used}
        # Only where there are some: fingerprints of other corpora must not change.
        if self.kept_step_texts:
            recipe["kept_step_texts"] = sorted(self.kept_step_texts)
        return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.languages) != (2 if self.kind == "translation" else 1):
            raise ValueError(f"{len(self.languages)} languages do not fit kind {self.kind}")
        if not all(self.archives.values()):
            raise ValueError("archives: a list of files is empty")
        if self.generator and set(self.sizes) != set(SPLITS):
            raise ValueError("sizes: a generator needs the number of lines of every split")
        for name, split in self.splits.items():
            problem = self._split_problem(name, split)
            if problem:
                raise ValueError(f"splits.{name}: {problem}")
        return self

    def _split_problem(self, name: str, split: Split) -> str | None:
        if split.every and (name == "train" or split.parts or split.steps or self.generator):
            return "`every` takes lines of train and goes with no parts, steps or generator"
        if not (split.every or split.parts or self.generator):
            return "neither parts nor `every` nor a generator"
        if CLEAN in split.steps + split.after_bpe and (self.clean is None or not self.is_parallel):
            return f"step {CLEAN} needs the limits `clean` and two languages"
        for part in split.parts:
            if set(part.members) != set(self.languages):
                return f"members must be given for {', '.join(self.languages)}"
            for archive, _ in part.sources(self.languages):
                if archive not in self.archives:
                    return f"archive {archive!r} is not under `archives`"
        return None

    @property
    def archive_folder(self) -> str:
        """The corpus in whose folder the archives lie."""
        return self.archives_of or self.name

    def used_archives(self) -> set[str]:
        """Names of the archives that some split reads."""
        parts = [part for split in self.splits.values() for part in split.parts]
        return {archive for part in parts for archive, _ in part.sources(self.languages)}

    @property
    def kept_step_texts(self) -> set[str]:
        """Files ``<split>.<step>.<language>`` with train's text between the steps.

        They are kept only to compare their hashes with the expected ones.
        """
        prefix = f"text/{STEP_TEXTS}/"
        return {
            path.removeprefix(prefix) for path in self.expected.hashes if path.startswith(prefix)
        }

    @property
    def is_parallel(self) -> bool:
        """Whether lines come in pairs."""
        return self.kind == "translation"


def load_catalogue(path: Path = CATALOGUE) -> dict[str, Corpus]:
    """All corpora by name. Raises UserError naming the entry and key that are wrong."""
    try:
        entries = read_yaml(path)["corpora"]
        corpora = {}
        for name, entry in entries.items():
            corpora[name] = Corpus.model_validate({**entry, "name": name})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, [name, *first["loc"]]))
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{path}, {where}: {message}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read the catalogue of corpora {path}: {error}") from error
    return corpora
