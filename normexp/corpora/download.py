"""Find a corpus's files in a local folder or fetch them from their mirrors, hashes checked."""

import gzip
import logging
import os
import time
import zlib
from pathlib import Path
from typing import IO

import requests
import urllib3
from tqdm import tqdm

from normexp.corpora.atomic_stage import locked
from normexp.corpora.catalogue import Archive, Corpus
from normexp.corpora.hashing import file_hash
from normexp.corpora.raw_text import MAX_MEMBER_BYTES
from normexp.errors import UserError
from normexp.files import open_own

log = logging.getLogger(__name__)

# Some mirrors answer 403 to a library's own name. "identity": a server must not unpack a .gz for
# us, since the hash is that of the packed file.
HEADERS = {"User-Agent": "normexp/0.1 (research)", "Accept-Encoding": "identity"}
TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 16  # bytes read at a time
MAX_BYTES = 16 << 30  # of an archive whose size is not known; the largest here has 1 GB
SLOWEST = 1 << 10, 60  # bytes a second over so many seconds: below that a mirror is given up
FRUITLESS = 1 << 20, 10  # a mirror that breaks off before so many bytes is tried so often in a row


class _TooMuch(Exception):
    """A server sends more than it should; the message says how much that is."""


class _TooSlow(requests.Timeout):
    """Bytes come, but it would take for ever."""


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
                limit = archive.size or corpus.disk_space or MAX_BYTES
                failure = _download(url, folder / archive.file, archive, limit, progress)
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
    partial, limit = _partial(path), archive.size or MAX_MEMBER_BYTES
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with gzip.open(packed) as source, open(open_own(partial, flags), "wb") as target:
            while block := source.read(CHUNK):
                target.write(block)
                if target.tell() > limit:
                    raise UserError(f"{packed} is larger than {limit} bytes unpacked; replace it")
        defect = _defect(partial, archive)
        if defect:
            raise UserError(f"{packed}, unpacked: {defect}; replace it or leave data.local away")
        os.replace(partial, path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{packed} is damaged ({error}); replace it") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def _download(url: str, path: Path, archive: Archive, limit: int, progress: bool) -> str | None:
    """Download `url` to `path`, resuming what an earlier attempt left, from whichever mirror.

    limit: bytes that the file has at most. Returns the reason of a failure, or None.
    """
    partial = _partial(path)
    log.info("downloading %s", url)
    fruitless = 0
    while True:
        present = _size(partial)
        if not present or present != archive.size:
            try:
                _transfer(url, partial, limit, progress)
            except _TooMuch as error:
                partial.unlink(missing_ok=True)
                return str(error)
            # Of a redirection to an impossible host requests raises what is urllib3's.
            except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
                came = _size(partial) - present
                if isinstance(error, _TooSlow) or came <= 0:
                    return _reason(error)
                fruitless = fruitless + 1 if came < FRUITLESS[0] else 0
                if fruitless == FRUITLESS[1]:
                    return f"broke off {fruitless} times in a row, {_size(partial)} bytes are kept"
                continue
        defect = _defect(partial, archive)
        if defect is None:
            os.replace(partial, path)
            return None
        partial.unlink()
        if not present:
            return defect
        # The pieces do not fit together; they may be of different files.


def _transfer(url: str, partial: Path, limit: int, progress: bool) -> None:
    """Append to `partial` the bytes of `url` that it lacks.

    Raises requests.RequestException, and _TooMuch where it would have more than `limit` bytes.
    """
    descriptor = open_own(partial, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with open(descriptor, "ab") as file:
        present = file.tell()
        headers = HEADERS | ({"Range": f"bytes={present}-"} if present else {})
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            # 416: there is nothing behind what is present, which is complete or too long.
            if response.status_code == 416:
                return
            response.raise_for_status()
            if response.status_code != 206:  # the server sends the whole file, not the rest
                file.truncate(0)
                present = 0
            announced = response.headers.get("Content-Length", "")
            rest = int(announced) if announced.isdecimal() else None
            if rest is not None and present + rest > limit:
                raise _TooMuch(f"{present + rest} bytes instead of {limit}")
            total = None if rest is None else present + rest
            with tqdm(
                total=total, initial=present, unit="B", unit_scale=True, disable=not progress
            ) as bar:
                _receive(response, file, limit - present, bar)


def _receive(response: requests.Response, file: IO[bytes], most: int, bar: tqdm) -> None:
    came, checked, deadline = 0, 0, time.monotonic() + SLOWEST[1]
    try:
        while block := response.raw.read1(CHUNK):  # what there is: a slow server is noticed
            came += len(block)
            if came > most:
                raise _TooMuch(f"more than the {most} bytes that it should have at most")
            file.write(block)
            bar.update(len(block))
            if time.monotonic() > deadline:
                if came - checked < SLOWEST[0] * SLOWEST[1]:
                    raise _TooSlow
                checked, deadline = came, time.monotonic() + SLOWEST[1]
    except urllib3.exceptions.TimeoutError as error:
        raise requests.Timeout(error) from error
    except urllib3.exceptions.HTTPError as error:
        raise requests.ConnectionError(error) from error


def _reason(error: Exception) -> str:
    if isinstance(error, requests.HTTPError):
        return f"HTTP {error.response.status_code}"
    if isinstance(error, _TooSlow):
        return f"less than {SLOWEST[0]} bytes a second"
    if isinstance(error, requests.Timeout):
        return f"no answer within {TIMEOUT} s"
    if isinstance(error, requests.ConnectionError | requests.exceptions.ChunkedEncodingError):
        return "no connection, or it broke off"
    return type(error).__name__


def _size(path: Path) -> int:
    return path.lstat().st_size if path.is_file() and not path.is_symlink() else 0


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
