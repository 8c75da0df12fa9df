"""What a user asks scripts/add_corpus.py for, and whether that can be."""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from normexp.corpora.catalogue import load_catalogue
from normexp.corpora.given_texts import LANGUAGE
from normexp.errors import UserError
from normexp.paths import CONFIGS


@dataclass(frozen=True)
class Request:
    """What the user asks for: the arguments of scripts/add_corpus.py."""

    name: str
    sources: list[Path]
    valid: list[Path] = field(default_factory=list)
    test: list[Path] = field(default_factory=list)
    languages: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    tokenized: bool = False
    segmented: str | None = None  # one of catalogue.SUBWORDS
    bpe_codes: Path | None = None
    sentencepiece: Path | None = None
    bpe_merges: int | None = None
    separate_dictionaries: bool = False
    drop_empty: bool = False
    max_words: int = 250
    replace: bool = False
    data_dir: Path = Path("data")

    def command(self) -> str:
        """The command that makes the corpus anew, from any folder."""
        words: list[object] = ["python", "scripts/add_corpus.py", self.name]
        words += [path.absolute() for path in self.sources]
        for option, values in (
            ("--valid", [path.absolute() for path in self.valid]),
            ("--test", [path.absolute() for path in self.test]),
            ("--languages", self.languages),
            ("--columns", self.columns),
            ("--segmented", [self.segmented.replace("_", "-")] if self.segmented else []),
            ("--bpe-codes", [self.bpe_codes.absolute()] if self.bpe_codes else []),
            ("--sentencepiece", [self.sentencepiece.absolute()] if self.sentencepiece else []),
            ("--bpe-merges", [] if self.bpe_merges is None else [self.bpe_merges]),
            ("--max-words", [] if self.max_words == Request.max_words else [self.max_words]),
            ("--data-dir", [] if self.data_dir == Path("data") else [self.data_dir.absolute()]),
        ):
            words += [option, *values] if values else []
        for option in ("tokenized", "separate_dictionaries", "drop_empty"):
            words += [f"--{option.replace('_', '-')}"] if getattr(self, option) else []
        return shlex.join(map(str, [*words, "--replace"]))


def check_request(request: Request) -> None:
    """Raise UserError for a name or options that cannot be, before a file is read."""
    _check_name(request.name)
    _check_options(request)


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,63}", name):
        raise UserError(
            f"{name!r} cannot be the name of a corpus: it names files and a task; use up to 64 "
            "letters, digits, - and _, a letter first"
        )
    shipped = {
        path.stem for group in ("task", "experiment") for path in (CONFIGS / group).iterdir()
    }
    reserved = {"null", "none", "true", "false", "nan", "inf"}
    if name in shipped | set(load_catalogue()) or name.lower() in reserved:
        raise UserError(f"{name} is a name of the project's; choose another for your corpus")


def _check_options(request: Request) -> None:
    ways = {
        "--bpe-codes": request.bpe_codes,
        "--sentencepiece": request.sentencepiece,
        "--segmented": request.segmented,
        "--bpe-merges": request.bpe_merges,
    }
    given = [option for option, value in ways.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are alternatives; leave one")
    if request.bpe_merges is not None and request.bpe_merges < 0:
        raise UserError(f"--bpe-merges {request.bpe_merges}: a number of at least 0 (0: no BPE)")
    if request.max_words < 1:
        raise UserError(f"--max-words {request.max_words}: a number of at least 1")
    for language in request.languages:
        if not LANGUAGE.fullmatch(language):
            raise UserError(
                f"--languages: {language!r} is no code of two or three small letters (ISO 639), "
                "such as cs; leave regions and scripts out (pt for pt_BR)"
            )
    for path in filter(None, (request.bpe_codes, request.sentencepiece)):
        if not path.is_file():
            raise UserError(f"there is no file {path}")
