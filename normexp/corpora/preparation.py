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
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from normexp.corpora.atomic_stage import build_stage, changed_files, locked, read_json
from normexp.corpora.binarization import build_binary
from normexp.corpora.catalogue import CATALOGUE, SPLITS, Corpus, Part, load_catalogue
from normexp.corpora.download import fetch
from normexp.corpora.expected_counts import compare
from normexp.corpora.parallel_text import Row, write_rows, zip_texts
from normexp.corpora.prepared import PreparedCorpus, defect_of_manifest
from normexp.corpora.process_pool import available_cores
from normexp.corpora.raw_text import FORMATS, member_hash, open_member
from normexp.corpora.text import build_text
from normexp.errors import UserError
from normexp.files import write_json

log = logging.getLogger(__name__)

# Increase it when a change to this package changes prepared bytes: then they are prepared anew.
VERSION = 1
TOOLS = ("sacremoses", "subword-nmt", "fairseq-fixed", "regex")


def available_corpora(catalogue: Path = CATALOGUE) -> list[str]:
    """Names of the corpora that `prepare` accepts."""
    return list(load_catalogue(catalogue))


def prepare(
    name: str,
    data_dir: Path,
    local: Path | None = None,
    progress: bool = True,
    catalogue: Path = CATALOGUE,
) -> PreparedCorpus:
    """Download, verify, tokenize and binarize a corpus into ``data_dir/<name>``.

    Does nothing if that has been done with the same recipe; a changed recipe prepares anew.
    `local` is a folder searched for the corpus's files before any download. Processes that
    prepare the same corpus wait for each other.

    Raises UserError: unknown name, no source reachable, wrong hash, too little disk space, or
    counts that differ from those the catalogue enforces.
    """
    # Bars are for people: in a log file every step of theirs would be a line.
    progress = progress and sys.stderr.isatty()
    corpora = load_catalogue(catalogue)
    if name not in corpora:
        raise UserError(f"no corpus {name!r}; known are {', '.join(corpora)}")
    corpus, data_dir = corpora[name], Path(data_dir)
    fingerprint = _fingerprint(corpus)
    directory = data_dir / name
    # Without the lock: a finished corpus can lie on a disk that is not writable.
    prepared = _finished(corpus, directory, fingerprint)
    if prepared is None:
        with _explained(directory), locked(data_dir / f"{name}.lock"):
            prepared = _finished(corpus, directory, fingerprint)
            if prepared is None:
                local = None if local is None else Path(local)
                prepared = _prepare(corpus, directory, fingerprint, local, progress)
    return prepared


@contextlib.contextmanager
def _explained(directory: Path) -> Iterator[None]:
    """Raise a UserError for failures of the machine: a full or read-only disk, a killed process."""
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
    return PreparedCorpus(corpus.name, directory, manifest)


def _prepare(
    corpus: Corpus, directory: Path, fingerprint: str, local: Path | None, progress: bool
) -> PreparedCorpus:
    if local is not None and not local.is_dir():
        raise UserError(f"data.local={local} is not a folder")
    (directory / "manifest.json").unlink(missing_ok=True)
    _require_space(corpus, directory)
    workers = available_cores()
    raw_dir, text_dir, bin_dir = (directory / part for part in ("raw", "text", "data-bin"))
    raw = build_stage(
        raw_dir, fingerprint, lambda folder: build_raw(corpus, directory, folder, local, progress)
    )
    text = build_stage(
        text_dir, fingerprint, lambda folder: build_text(corpus, raw_dir, folder, workers, progress)
    )
    binary = build_stage(
        bin_dir,
        fingerprint,
        lambda folder: build_binary(corpus, text_dir, folder, workers, progress),
    )
    try:
        manifest = _manifest(corpus, fingerprint, raw, text, binary)
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


def _manifest(corpus: Corpus, fingerprint: str, raw: dict, text: dict, binary: dict) -> dict:
    """Join the records of the stages. Raises what damaged ones lead to."""
    stages = {"raw": raw, "text": text, "data-bin": binary}
    splits = {
        split: {"raw_sentences": raw["result"].get(split), "words": text["result"][split]}
        | binary["result"]["splits"][split]
        for split in SPLITS
    }
    return {
        "fingerprint": fingerprint,
        "name": corpus.name,
        "kind": corpus.kind,
        "languages": corpus.languages,
        "bpe": "subword_nmt" if corpus.bpe_merges else None,
        "lowercase": any("lowercase" in split.steps for split in corpus.splits.values()),
        "tools": {tool: version(tool) for tool in TOOLS}
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
            name: fetch(corpus, files, archives, local, progress)
            for name, files in corpus.archives.items()
            if name in corpus.used_archives()
        }
        for archive, expected in corpus.expected.members.items():
            members[archive] = {}
            for member, value in expected.items():
                algorithm = value.partition(":")[0]
                digest = member_hash(paths[archive], member, algorithm)
                members[archive][member] = f"{algorithm}:{digest}"
        rows = {
            split: _rows(corpus, recipe.parts, paths)
            for split, recipe in corpus.splits.items()
            if recipe.parts
        }
    sizes = {
        split: write_rows(
            rows[split], [folder / f"{split}.{language}" for language in corpus.languages]
        )
        for split in rows
    }
    return sizes | {"members": members}


def _rows(corpus: Corpus, parts: list[Part], paths: dict[str, Path]) -> Iterator[Row]:
    for part in parts:
        with contextlib.ExitStack() as stack:
            columns = [
                FORMATS[part.format](stack.enter_context(open_member(paths[archive], member)))
                for archive, member in part.sources(corpus.languages)
            ]
            yield from zip_texts(columns, list(part.members.values()))


def _check(corpus: Corpus, manifest: dict, directory: Path) -> None:
    comparisons = compare(corpus, manifest, directory)
    wrong = [str(comparison) for comparison in comparisons if not comparison.agrees]
    if wrong and corpus.expected.enforced:
        raise UserError(
            f"corpus {corpus.name} did not come out as it must: {'; '.join(wrong)}. Compare the "
            "installed tools with the pinned ones and report the difference"
        )
    for difference in wrong:
        log.warning("corpus %s: %s", corpus.name, difference)
