"""A user's own corpora: where scripts/add_corpus.py puts them, and whether their sources changed.

``<own folder>/corpora/<name>/`` holds catalogue.yaml (an entry like those of data/catalogue.yaml,
and its origin) and the texts that it names, copied when the corpus was added. The copy is what is
prepared and trained on, so a corpus stays what it was; the files it was made of are looked at
again to say that they have changed.
"""

import hashlib
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from normexp.corpora.catalogue import Corpus, load_catalogue
from normexp.corpora.hashing import file_hash
from normexp.errors import UserError, invalid_fields
from normexp.files import whole_file
from normexp.paths import own_folder

ENTRY = "catalogue.yaml"
DIGITS = 12


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Model):
    """A file that a corpus was made of. state: size, times and inode, by which to see a change."""

    path: Path
    sha256: str
    state: tuple[int, int, int, int]

    @classmethod
    def of(cls, path: Path) -> "Source":
        """Describe the file as it is now."""
        state = _state(path)  # first: a change while it is read must not go unnoticed
        return cls(path=path.absolute(), sha256=file_hash(path), state=state)

    def has_changed(self) -> bool:
        """Return whether the file is there and has another content. It is read only if it may."""
        if not self.path.is_file() or _state(self.path) == self.state:
            return False
        return file_hash(self.path) != self.sha256


class Origin(_Model):
    """How an own corpus was made: the command that makes it again, and from which files."""

    command: str
    sources: list[Source]
    task_sha256: str = ""  # of the task's configuration as written, to see whether it was edited


def folder_of(name: str) -> Path:
    """The folder of an own corpus."""
    return own_folder() / "corpora" / name


def task_file(name: str) -> Path:
    """The configuration of an own corpus's task, where Hydra looks for ``task=<name>``."""
    return own_folder() / "configs" / "task" / f"{name}.yaml"


def own_names() -> list[str]:
    """Names of all own corpora."""
    return sorted(path.parent.name for path in (own_folder() / "corpora").glob(f"*/{ENTRY}"))


def load_own(name: str) -> tuple[Corpus, Origin] | None:
    """An own corpus, or None if there is none of this name. Raises UserError if it is damaged."""
    path = folder_of(name) / ENTRY
    if not path.is_file():
        return None
    corpus = load_catalogue(path).get(name)
    if corpus is None:
        raise UserError(f"{path} has no entry {name}; {_cure(name)}")
    try:
        origin = Origin.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))["origin"])
    except KeyError:
        raise UserError(f"{path} has no origin; {_cure(name)}") from None
    except ValidationError as error:
        raise UserError(f"{path}, origin: {invalid_fields(error)}; {_cure(name)}") from None
    return corpus.model_copy(update={"folder": path.parent}), origin


def write_own(folder: Path, name: str, entry: dict, origin: Origin) -> None:
    """Write the entry of an own corpus into its folder."""
    _write(folder, {"corpora": {name: entry}, "origin": origin.model_dump(mode="json")})


def remember_task(name: str, text: str) -> None:
    """Note how the task of an own corpus was written, by which to see whether it was edited."""
    content = yaml.safe_load((folder_of(name) / ENTRY).read_text(encoding="utf-8"))
    content["origin"]["task_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    _write(folder_of(name), content)


def _write(folder: Path, content: dict) -> None:
    with whole_file(folder / ENTRY) as file:
        file.write("# Written by scripts/add_corpus.py; run it again rather than edit this file.\n")
        yaml.safe_dump(content, file, sort_keys=False, allow_unicode=True)


def pinned(corpus: Corpus) -> str:
    """``<name>@<digest>``: the corpus as it is now. A task that names it has the identity of that
    text, so that runs on another text are other runs."""
    return f"{corpus.name}@{corpus.fingerprint()[:DIGITS]}"


def is_version(corpus: Corpus, digest: str) -> bool:
    """Whether `digest`, what stands behind the @ of `pinned`, is that of the corpus as it is."""
    return pinned(corpus) == f"{corpus.name}@{digest}"


def require_version(corpus: Corpus, digest: str) -> None:
    """Raise UserError unless `digest` is that of the corpus as it is."""
    if not is_version(corpus, digest):
        raise UserError(
            f"the corpus {corpus.name} is another one now, {pinned(corpus)}, and the data of "
            f"{corpus.name}@{digest} are not in data.dir any more: only with them can a run on "
            "that text be continued or evaluated; a new run takes task.corpus="
            f"{pinned(corpus)}"
        )


def require_unchanged(name: str, origin: Origin) -> None:
    """Raise UserError if a file that the corpus was made of has another content now.

    A file that is gone is no error: the corpus has its copy.
    """
    for source in origin.sources:
        if source.has_changed():
            raise UserError(
                f"{source.path} has changed since the corpus {name} was made of it. To use the "
                f"text as it is now: {origin.command} (runs on it are other runs). To go on with "
                f"the text as it was, which is kept in {folder_of(name)}: restore the file, or "
                "move it away"
            )


def _state(path: Path) -> tuple[int, int, int, int]:
    now = path.stat()
    return now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino


def _cure(name: str) -> str:
    return f"add the corpus again: python scripts/add_corpus.py {name} ... --replace"
