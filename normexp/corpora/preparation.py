"""From a name in the catalogue to binarized data.

``data/<name>/`` holds archives/ (downloads), raw/ (plain text), text/ (tokenized, BPE, references),
data-bin/ (for fairseq) and, written last, manifest.json. Each folder is complete or absent, so
a killed preparation resumes after its last finished stage.
"""

import contextlib
import errno
import hashlib
import importlib
import logging
import platform
import shutil
import sys
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from normexp.corpora import own_corpora
from normexp.corpora.atomic_stage import RECORD, build_stage, changed_files, locked, read_json
from normexp.corpora.binarization import build_binary
from normexp.corpora.binarized import copy_binary, decoded
from normexp.corpora.catalogue import CATALOGUE, SPLITS, Archive, Corpus, Part, load_catalogue
from normexp.corpora.download import fetch
from normexp.corpora.expected_counts import compare, explain
from normexp.corpora.hashing import file_hash
from normexp.corpora.parallel_text import Row, write_rows, zip_texts
from normexp.corpora.prepared import PreparedCorpus, defect_of_manifest
from normexp.corpora.process_pool import available_cores
from normexp.corpora.raw_text import FORMATS, member_hash, open_member
from normexp.corpora.text import build_text
from normexp.errors import UserError
from normexp.files import write_json

log = logging.getLogger(__name__)

# Increase it when a change to this package changes prepared bytes: then they are prepared anew.
VERSION = 2
TOOLS = ("sacremoses", "subword-nmt", "fairseq-fixed", "regex")


def available_corpora(catalogue: Path = CATALOGUE) -> list[str]:
    """Names of the corpora that `prepare` accepts: the catalogue's, then the user's own."""
    return [*load_catalogue(catalogue), *own_corpora.own_names()]


def find_corpus(name: str, catalogue: Path = CATALOGUE) -> Corpus:
    """The entry of a corpus of the catalogue or of the user's own, looked at but not prepared.

    name: as in the catalogue; for an own corpus also NAME@DIGEST, a certain version of it. Raises
    UserError for an unknown name, another version, or an own corpus whose source files changed.
    """
    name, at, digest = name.partition("@")
    corpora, own = load_catalogue(catalogue), own_corpora.load_own(name)
    if own is None:
        if name not in corpora or at:
            known = ", ".join(available_corpora(catalogue))
            raise UserError(
                f"no corpus {name + at + digest!r}; known are {known}; a corpus of your own is "
                "added by: python scripts/add_corpus.py NAME FILE ..."
            )
        return corpora[name]
    if name in corpora:
        raise UserError(
            f"there are two corpora {name}, the project's and your own: move "
            f"{own_corpora.folder_of(name)} away and add your own under another name"
        )
    corpus, origin = own
    own_corpora.require_unchanged(name, origin)
    if at:
        own_corpora.require_version(corpus, digest)
    return corpus


def prepare(
    name: str,
    data_dir: Path,
    local: Path | None = None,
    progress: bool = True,
    catalogue: Path = CATALOGUE,
    *,
    splits: Iterable[str] = (),
) -> PreparedCorpus:
    """Download, verify, tokenize and binarize a corpus into ``data_dir/<name>``.

    That of an own corpus is ``<name>@<digest>``, one for each version of its text.

    Does nothing if that has been done with the same recipe; a changed recipe prepares anew.
    `local` is a folder searched for the corpus's files before any download. Processes that
    prepare the same corpus wait for each other. `splits` are those to be evaluated: of the
    corpus's further test sets only these are prepared, in ``data_dir/<name>/test_sets/``.

    name: as `find_corpus` takes it. Raises UserError: as that does; no source reachable, wrong
    hash, too little disk space, or counts that differ from those the catalogue enforces.
    """
    # Bars are for people: in a log file every step of theirs would be a line.
    progress = progress and sys.stderr.isatty()
    data_dir = Path(data_dir)
    if earlier := _earlier_version(name, data_dir):
        return earlier
    corpus = find_corpus(name, catalogue)
    further = _further_test_sets(corpus, splits)
    fingerprint = _fingerprint(corpus)
    # Versions of an own corpus lie beside each other, so that earlier runs can be evaluated.
    folder = own_corpora.pinned(corpus) if corpus.folder else corpus.name
    directory = data_dir / folder
    # Without the lock: a finished corpus can lie on a disk that is not writable.
    prepared = _finished(corpus, directory, fingerprint)
    if prepared is None:
        with failures_explained(directory), locked(data_dir / f"{folder}.lock"):
            prepared = _finished(corpus, directory, fingerprint)
            if prepared is None:
                prepared = _prepare(corpus, directory, fingerprint, local, progress)
    test_sets = {name: _test_set(corpus, name, prepared, local, progress) for name in further}
    return replace(prepared, test_sets=test_sets)


@contextlib.contextmanager
def failures_explained(directory: Path) -> Iterator[None]:
    """Raise a UserError for failures of the machine: a full or read-only disk, a killed process."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # also a file in the place of a folder
        raise UserError(
            f"cannot write to {directory} ({error.strerror}); make room or choose another data.dir"
        ) from error
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise UserError(
            f"cannot write to {directory} ({error.strerror}); make room or choose another data.dir"
        ) from error
    except BrokenProcessPool as error:
        raise UserError(
            f"a process that prepared {directory} was killed, probably for want of memory; "
            "the same command resumes after the last finished stage"
        ) from error


def _fingerprint(corpus: Corpus) -> str:
    parts = [str(VERSION), corpus.fingerprint()]
    if corpus.generator:  # a changed generator or lexicon makes another corpus
        folder = Path(_generator(corpus).__file__).parent
        sources = sorted([*folder.glob("*.py"), *folder.glob("*.yaml")])
        parts += [source.read_text(encoding="utf-8") for source in sources]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _generator(corpus: Corpus) -> ModuleType:
    return importlib.import_module(f"normexp.corpora.{corpus.generator}")


def _earlier_version(name: str, data_dir: Path) -> PreparedCorpus | None:
    """The data of NAME@DIGEST if that is not the own corpus NAME as it is now."""
    own_name, _, digest = name.partition("@")
    own = own_corpora.load_own(own_name) if digest else None
    if own is None or own_corpora.is_version(own[0], digest):
        return None
    directory = data_dir / name
    manifest = read_json(directory / "manifest.json")
    if manifest and not changed_files(directory, manifest["files"]):
        _refuse_foreign_data(directory, manifest["files"])
        return PreparedCorpus(own_name, directory, manifest)
    return None


def _finished(corpus: Corpus, directory: Path, fingerprint: str) -> PreparedCorpus | None:
    manifest = read_json(directory / "manifest.json")
    if manifest is None or manifest.get("fingerprint") != fingerprint:
        return None
    if defect := defect_of_manifest(manifest):
        log.warning("%s is damaged (%s); making it again", directory / "manifest.json", defect)
        return None
    if changed := changed_files(directory, manifest["files"]):
        log.warning("%s was changed since it was prepared; preparing again", changed[0])
        return None
    if _counts_of_stages(directory) not in (None, _counts(manifest)):
        log.warning(
            "%s was changed since it was made; making it again", directory / "manifest.json"
        )
        return None
    _refuse_foreign_data(directory, manifest["files"])
    return PreparedCorpus(corpus.name, directory, manifest)


def _counts_of_stages(directory: Path) -> dict | None:
    """Return `_counts` by the records of the stages; None where they cannot be read."""
    records = [read_json(directory / stage / RECORD) for stage in ("text", "data-bin")]
    try:
        text, binary = (record["result"] for record in records)
        words = {split: text[split] for split in binary["splits"]}
        return {"words": words, "splits": binary["splits"]}
    except (LookupError, TypeError):
        return None


def _counts(manifest: dict) -> dict:
    """Return what metrics divide by: words, and sentences and tokens, of each split."""
    splits = {split: dict(counts) for split, counts in manifest["splits"].items()}
    for counts in splits.values():
        counts.pop("raw_sentences", None)
    words = {split: counts.pop("words") for split, counts in splits.items()}
    return {"words": words, "splits": splits}


def _refuse_foreign_data(directory: Path, files: Collection[str]) -> None:
    """Raise UserError for data that was put beside the corpus's.

    fairseq reads train1.de-en.de.bin behind train.de-en.de.bin, and no record would say so.
    """
    for path in sorted((directory / "data-bin").glob("*")):
        if path.suffix in (".bin", ".idx") and f"data-bin/{path.name}" not in files:
            raise UserError(
                f"{path} is none of the corpus's files, and fairseq may read it, too: move it away"
            )


def _prepare(
    corpus: Corpus,
    directory: Path,
    fingerprint: str,
    local: Path | None,
    progress: bool,
    base: PreparedCorpus | None = None,
) -> PreparedCorpus:
    """Make every stage; `base` is the corpus whose codes and dictionaries a test set gets."""
    local = None if local is None else Path(local)
    if local is not None and not local.is_dir():
        raise UserError(f"data.local={local} is not a folder")
    (directory / "manifest.json").unlink(missing_ok=True)
    if base is None:
        _require_space(corpus, directory)
    workers = available_cores()
    raw_dir, text_dir, bin_dir = (directory / part for part in ("raw", "text", "data-bin"))
    home, codes, dictionaries = directory, {}, {}
    if base is not None:
        home = base.directory
        codes, dictionaries = {"trained": home / "text"}, {"trained": base.data_bin}
    raw = build_stage(
        raw_dir, fingerprint, lambda folder: build_raw(corpus, home, folder, local, progress)
    )
    text = build_stage(
        text_dir,
        fingerprint,
        lambda folder: build_text(corpus, raw_dir, folder, workers, progress, **codes),
    )
    binary = build_stage(
        bin_dir,
        fingerprint,
        lambda folder: (
            copy_binary(corpus, folder, progress)
            if corpus.binarized
            else build_binary(corpus, text_dir, folder, workers, progress, **dictionaries)
        ),
    )
    try:
        names = SPLITS if base is None else tuple(corpus.splits)
        manifest = _manifest(corpus, fingerprint, names, raw, text, binary)
        defect = defect_of_manifest(manifest)
    except (LookupError, TypeError, AttributeError) as error:
        defect = f"{type(error).__name__}: {error}"
    if defect:
        raise UserError(
            f"a stage.json in {directory} is damaged ({defect}); remove raw, text and data-bin "
            "there to prepare the corpus again"
        )
    _check(corpus, manifest, directory)
    write_json(directory / "manifest.json", manifest)
    return PreparedCorpus(corpus.name, directory, manifest)


def _manifest(
    corpus: Corpus,
    fingerprint: str,
    names: tuple[str, ...],
    raw: dict,
    text: dict,
    binary: dict,
) -> dict:
    """Join the records of the stages; names: the splits. Raises what damaged ones lead to."""
    stages = {"raw": raw, "text": text, "data-bin": binary}
    splits = {
        split: {"raw_sentences": raw["result"].get(split), "words": text["result"][split]}
        | binary["result"]["splits"][split]
        for split in names
    }
    tools = TOOLS + (("sentencepiece",) if corpus.sentencepiece else ())
    return {
        "fingerprint": fingerprint,
        "name": corpus.name,
        "kind": corpus.kind,
        "languages": corpus.languages,
        "bpe": corpus.bpe,
        "text": corpus.text,
        "lowercase": any("lowercase" in split.steps for split in corpus.splits.values()),
        "tools": {tool: version(tool) for tool in tools}
        | {"python": platform.python_version(), "unicode": unicodedata.unidata_version},
        "splits": splits,
        "dictionary_types": binary["result"]["dictionary_types"],
        "members": raw["result"].get("members", {}),
        "files": {
            f"{stage}/{path}": record
            for stage, built in stages.items()
            for path, record in built["files"].items()
        },
    }


def _require_space(corpus: Corpus, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    folders = {directory, directory.parent / corpus.archive_folder / "archives"}
    files = {path for folder in folders for path in folder.rglob("*") if path.is_file()}
    present = sum(path.stat().st_size for path in files)
    free = shutil.disk_usage(directory).free
    if free + present < corpus.disk_space:
        raise UserError(
            f"corpus {corpus.name} needs {corpus.disk_space / 1e9:.1f} GB in {directory}, where "
            f"{(free + present) / 1e9:.1f} GB are free; make room or choose another data.dir"
        )


def build_raw(
    corpus: Corpus, directory: Path, folder: Path, local: Path | None, progress: bool
) -> dict:
    """Write ``folder/<split>.<language>``, the untouched text.

    Returns the lines per split and, as "members", the hashes of those files inside the archives
    for which the catalogue has one.
    """
    members: dict[str, dict[str, str]] = {}
    if corpus.generator:
        texts = _generator(corpus).generate(corpus.seed, corpus.sizes)
        rows = {
            split: [row if isinstance(row, tuple) else (row,) for row in texts[split]]
            for split in corpus.sizes
        }
    else:
        archives = directory.parent / corpus.archive_folder / "archives"
        paths = {
            name: _own_archive(corpus, files[0])
            if corpus.folder
            else fetch(corpus, files, archives, local, progress)
            for name, files in corpus.archives.items()
            if name in corpus.used_archives()
        }
        for name in filter(None, (corpus.bpe_codes, corpus.sentencepiece)):
            shutil.copyfile(paths[name], folder / name)
        for archive, expected in corpus.expected.members.items():
            members[archive] = {}
            for member, value in expected.items():
                algorithm = value.partition(":")[0]
                digest = member_hash(paths[archive], member, algorithm)
                members[archive][member] = f"{algorithm}:{digest}"
        rows = {
            split: decoded(corpus, split, progress)
            if corpus.binarized
            else _rows(corpus, recipe.parts, paths)
            for split, recipe in corpus.splits.items()
            if recipe.parts or corpus.binarized
        }
    sizes = {
        split: write_rows(
            rows[split], [folder / f"{split}.{language}" for language in corpus.languages]
        )
        for split in rows
    }
    return sizes | {"members": members}


def _own_archive(corpus: Corpus, archive: Archive) -> Path:
    """The copy of an own corpus's file. Raises UserError if it is not what was added."""
    path = corpus.folder / archive.file
    algorithm, _, digest = archive.hash.partition(":")
    if not path.is_file() or file_hash(path, algorithm) != digest:
        raise UserError(
            f"{path} is missing or has been changed; add the corpus again: python "
            f"scripts/add_corpus.py {corpus.name} ... --replace"
        )
    return path


def _rows(corpus: Corpus, parts: list[Part], paths: dict[str, Path]) -> Iterator[Row]:
    for part in parts:
        with contextlib.ExitStack() as stack:
            columns = [
                FORMATS[part.format](stack.enter_context(open_member(paths[archive], member)))
                for archive, member in part.sources(corpus.languages)
            ]
            yield from zip_texts(columns, list(part.members.values()))


def _check(corpus: Corpus, manifest: dict, directory: Path) -> None:
    wrong = explain(corpus, compare(corpus, manifest, directory))
    if wrong and corpus.expected.enforced:
        raise UserError(
            f"corpus {corpus.name} did not come out as it must: {'; '.join(wrong)}. Compare the "
            "installed tools with the pinned ones and report the difference"
        )
    for difference in wrong:
        log.warning("corpus %s: %s", corpus.name, difference)


def _further_test_sets(corpus: Corpus, splits: Iterable[str]) -> list[str]:
    """Those of `splits` outside the corpus itself. Raises UserError for unknown ones."""
    for split in splits:
        if split not in (*SPLITS, *corpus.test_sets):
            raise UserError(
                f"evaluation.splits: corpus {corpus.name} has no {split}; known: "
                f"{', '.join([*SPLITS[1:], *corpus.test_sets])}"
            )
    return [split for split in splits if split in corpus.test_sets]


def _test_set(
    corpus: Corpus, name: str, base: PreparedCorpus, local: Path | None, progress: bool
) -> PreparedCorpus:
    """Prepare a further test set of a prepared corpus, unless that has been done."""
    alone = corpus.alone(name)
    parts = (base.manifest["fingerprint"], alone.fingerprint())
    fingerprint = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    directory = base.directory / "test_sets" / name
    finished = _finished(alone, directory, fingerprint)
    if finished is not None:
        return finished
    with failures_explained(directory), locked(base.directory.with_name(f"{corpus.name}.lock")):
        finished = _finished(alone, directory, fingerprint)
        return finished or _prepare(alone, directory, fingerprint, local, progress, base)
