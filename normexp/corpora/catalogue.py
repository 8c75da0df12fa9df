"""The catalogue of corpora: the sources, the recipe and the expected results of each.

`data/catalogue.yaml` is the single description of every corpus; its keys are the fields of the
models below, so a misspelt or missing key is an error that names it.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

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
TEST_SET_NAME = r"^test_[A-Za-z0-9_]+$"  # it names files
HASH = rf"^({'|'.join(ALGORITHMS)}):[0-9a-f]+$"

SUBWORDS = ("subword_nmt", "sentencepiece")
"""fairseq's names of the marks by which pieces of words are joined: ``@@`` and ``\u2581``."""

LATER_FIELDS = ("bpe_codes", "sentencepiece", "segmented", "tokenized", "binarized")
"""Fields of `Corpus` that came after corpora had been prepared; without effect if not given."""

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


class ExpectedTestSet(_Model):
    """Expected results of a further test set."""

    enforced: bool = False
    counts: dict[str, Any] = {}  # as under expected.splits.<split>
    hashes: dict[str, str] = {}  # path below the test set's folder -> its hash


class TestSet(Split):
    """A test set besides `test`, prepared with the corpus's BPE codes and dictionaries.

    It is fetched and made only where an evaluation asks for it.
    """

    __test__ = False  # no class of tests, although pytest would take it for one
    expected: ExpectedTestSet = ExpectedTestSet()


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
    test_sets: dict[Annotated[str, Field(pattern=TEST_SET_NAME)], TestSet] = {}
    disk_space: int = 0  # bytes needed in all
    clean: Clean | None = None
    bpe_merges: int = 0  # 0: no BPE
    bpe_codes: str | None = None  # archive with subword-nmt's codes, instead of learning them
    sentencepiece: str | None = None  # archive with a sentencepiece model that segments the text
    segmented: Literal[*SUBWORDS] | None = None  # the text comes in pieces, with these marks
    tokenized: bool = False  # the text comes tokenized
    binarized: bool = False  # the archives are a data folder of fairseq's; splits have no parts
    joined_dictionary: bool = False
    folder: Path | None = Field(None, exclude=True)  # where the archives of an own corpus lie
    expected: Expected = Expected()
    known_deviations: list[KnownDeviation] = []

    def fingerprint(self) -> str:
        """Hash of everything that decides the prepared bytes, and of nothing else."""
        recipe = self.model_dump(
            mode="json",
            exclude={
                "name": True, "description": True, "licence": True, "homepage": True,
                "archives_of": True, "disk_space": True, "expected": True,
                "known_deviations": True, "test_sets": True,
                "archives": {"__all__": {"__all__": {"urls", "size", "verified", "hash_source"}}},
            },
        )  # fmt: skip
        for field in LATER_FIELDS:
            if recipe[field] == type(self).model_fields[field].default:
                del recipe[field]  # fingerprints of other corpora must not change
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
        ways = [self.bpe_merges, self.bpe_codes, self.sentencepiece]
        ways += [self.segmented or self.binarized]
        if sum(map(bool, ways)) > 1:
            raise ValueError(
                "bpe_merges, bpe_codes, sentencepiece, and text that is segmented or binarized "
                "already are alternatives"
            )
        recipes = self.splits.values()
        if self.segmented and any(split.every or split.steps for split in recipes):
            raise ValueError("segmented: text in pieces goes through no steps")
        for archive in (self.bpe_codes, self.sentencepiece):
            if archive and archive not in self.archives:
                raise ValueError(f"archive {archive!r} is not under `archives`")
        for name, split in self.splits.items():
            problem = self._split_problem(name, split)
            if problem:
                raise ValueError(f"splits.{name}: {problem}")
        for name, test_set in self.test_sets.items():
            problem = self._split_problem(name, test_set)
            if test_set.every or self.generator:
                problem = "a further test set has text of its own"
            if problem:
                raise ValueError(f"test_sets.{name}: {problem}")
        return self

    def _split_problem(self, name: str, split: Split) -> str | None:
        if split.every and (name == "train" or split.parts or split.steps or self.generator):
            return "`every` takes lines of train and goes with no parts, steps or generator"
        if not (split.every or split.parts or self.generator or self.binarized):
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
        """Names of the archives that some split or the segmentation reads."""
        if self.binarized:
            return set(self.archives)
        parts = [part for split in self.splits.values() for part in split.parts]
        texts = {archive for part in parts for archive, _ in part.sources(self.languages)}
        return texts | {name for name in (self.bpe_codes, self.sentencepiece) if name}

    def alone(self, name: str) -> "Corpus":
        """This corpus with a further test set as its only split."""
        test_set = self.test_sets[name]
        expected = self.expected.model_copy(
            update={
                "enforced": test_set.expected.enforced,
                "splits": {name: test_set.expected.counts},
                "dictionary_types": {},
                "members": {},
                "hashes": test_set.expected.hashes,
            }
        )
        return self.model_copy(
            update={"splits": {name: test_set}, "test_sets": {}, "expected": expected}
        )

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
    def bpe(self) -> str | None:
        """The marks of the pieces that are trained on, one of `SUBWORDS`; None: whole words."""
        if self.bpe_merges or self.bpe_codes:
            return "subword_nmt"
        return "sentencepiece" if self.sentencepiece else self.segmented

    @property
    def text(self) -> str:
        """What remains when pieces are joined: "moses" (tokenized here), "tokenized" or "plain"."""
        steps = {step for split in self.splits.values() for step in split.steps}
        if steps & {"tokenize", "tokenize_aggressive"}:
            return "moses"
        return "tokenized" if self.tokenized else "plain"

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
