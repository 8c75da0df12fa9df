"""Find a corpus's files in a local folder or fetch them from their mirrors, hashes checked."""

import gzip
import logging
import math
import os
import shutil
import zlib
from pathlib import Path

import pooch
import requests

from normexp.corpora.atomic_stage import locked
from normexp.corpora.catalogue import Archive, Corpus
from normexp.corpora.hashing import file_hash
from normexp.errors import UserError

log = logging.getLogger(__name__)

# Some mirrors answer 403 to a library's own name. "identity": a server must not unpack a .gz for
# us, since the hash is that of the packed file.
HEADERS = {"User-Agent": "normexp/0.1 (research)", "Accept-Encoding": "identity"}
TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 16  # bytes; an incomplete one is lost when a transfer breaks off


def fetch(
    corpus: Corpus, archives: list[Archive], folder: Path, local: Path | None, progress: bool
) -> Path:
    """Find or download one of the interchangeable `archives`; return the path of a verified copy.

    It is looked for in `local` (``local/<corpus>/<file>``, ``local/<file>``, both also gzipped),
    then in `folder` from an earlier call, then downloaded to `folder`, from the mirrors in the
    catalogue's order. Files in `local` are used where they lie.

    Raises UserError if a local file has the wrong hash, or if every mirror failed; the message
    names the file, what became of each mirror, and where to put the file by hand.
    """
    failures = []
    with locked(folder / ".lock"):  # corpora can share the folder
        for archive in archives:
            if local is not None and (copy := _local_copy(corpus, archive, folder, local)):
                return copy
        for archive in archives:
            path = folder / archive.file
            if path.exists() and _defect(path, archive) is None:
                return path
        for archive in archives:
            for url in archive.urls:
                failure = _download(url, folder / archive.file, archive, progress)
                if failure is None:
                    return folder / archive.file
                log.warning("%s: %s", url, failure)
                failures.append(f"{url} ({failure})")
    files = " or ".join(
        f"{archive.file} ({archive.hash}{'' if archive.verified else ', not verified by us'})"
        for archive in archives
    )
    raise UserError(
        f"corpus {corpus.name}: could not get {archives[0].file}; tried {', '.join(failures)}. "
        f"By hand: put {files} into {folder.absolute()}, or into a folder FOLDER/{corpus.name} "
        f"and pass data.local=FOLDER"
    )


def _local_copy(corpus: Corpus, archive: Archive, folder: Path, local: Path) -> Path | None:
    for parent in (local / corpus.name, local / corpus.archive_folder, local):
        path = parent / archive.file
        if path.is_file():
            defect = _defect(path, archive)
            if defect:
                raise UserError(f"{path}: {defect}; replace it, or leave data.local away")
            return path
        packed = path.with_name(path.name + ".gz")
        if packed.is_file():
            return _unpacked(packed, folder / archive.file, archive)
    return None


def _unpacked(packed: Path, path: Path, archive: Archive) -> Path:
    partial = _partial(path)
    try:
        with gzip.open(packed) as source, partial.open("wb") as target:
            shutil.copyfileobj(source, target)
        defect = _defect(partial, archive)
        if defect:
            raise UserError(f"{packed}, unpacked: {defect}; replace it or leave data.local away")
        os.replace(partial, path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{packed} is damaged ({error}); replace it") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def _download(url: str, path: Path, archive: Archive, progress: bool) -> str | None:
    """Download `url` to `path`, resuming what an earlier attempt left, from whichever mirror.

    Returns the reason of a failure, or None.
    """
    partial = _partial(path)
    log.info("downloading %s", url)
    while True:
        present = _size(partial)
        if not present or present != archive.size:
            try:
                _transfer(url, partial, progress)
            except requests.RequestException as error:
                if present < _size(partial) <= (archive.size or math.inf):
                    continue  # it broke off, but some bytes came
                return _reason(error)
        defect = _defect(partial, archive)
        if defect is None:
            os.replace(partial, path)
            return None
        partial.unlink()
        if not present:
            return defect
        # The pieces do not fit together; they may be of different files.


def _transfer(url: str, partial: Path, progress: bool) -> None:
    """Append to `partial` the bytes of `url` that it lacks. Raises requests.RequestException."""
    present = _size(partial)
    headers = HEADERS | ({"Range": f"bytes={present}-"} if present else {})
    with partial.open("ab") as file:

        def start_anew(response: requests.Response, **_) -> None:
            if response.status_code == 200:  # the server sends the whole file, not the rest (206)
                file.truncate(0)

        downloader = pooch.HTTPDownloader(
            progressbar=progress,
            chunk_size=CHUNK,
            headers=headers,
            timeout=TIMEOUT,
            hooks={"response": start_anew},
        )
        try:
            downloader(url, file, None)
        except requests.HTTPError as error:
            # 416: there is nothing behind what is present, which is complete or too long.
            if error.response.status_code != 416:
                raise


def _reason(error: requests.RequestException) -> str:
    if isinstance(error, requests.HTTPError):
        return f"HTTP {error.response.status_code}"
    if isinstance(error, requests.Timeout):
        return f"no answer within {TIMEOUT} s"
    if isinstance(error, requests.ConnectionError | requests.exceptions.ChunkedEncodingError):
        return "no connection, or it broke off"
    return type(error).__name__


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _defect(path: Path, archive: Archive) -> str | None:
    """What is wrong with a copy of `archive`, or None."""
    size = path.stat().st_size
    if archive.size is not None and size != archive.size:
        return f"{size} bytes instead of {archive.size}"
    algorithm, _, digest = archive.hash.partition(":")
    actual = file_hash(path, algorithm)
    if actual != digest:
        origin = "" if archive.verified else f" (published by {archive.hash_source})"
        return f"{algorithm} {actual} instead of {digest}{origin}"
    return None
