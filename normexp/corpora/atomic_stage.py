"""Atomic stages of a preparation: the folder of a stage is complete, with its record, or absent."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from normexp import files
from normexp.corpora.hashing import file_hash
from normexp.files import write_json

log = logging.getLogger(__name__)
RECORD = "stage.json"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`; wait, and log that, while another process has it.

    The lock ends with its process, even by SIGKILL. Processes forked meanwhile do not inherit it,
    so those of a killed preparation cannot keep it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # No soft lock where the file system has no locks: a killed process would leave it behind.
    lock = FileLock(path, fallback_to_soft=False)
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        log.info("another process is preparing this corpus; waiting for it (%s)", path)
        held = lock.acquire()
    with held:
        yield


def read_json(path: Path) -> dict | None:
    """The object in `path`, or None if it is absent or no JSON object."""
    try:
        content = files.read_json(path)
    except files.Unreadable:
        return None
    return content if isinstance(content, dict) else None


def changed_files(directory: Path, files: dict[str, dict]) -> list[Path]:
    """The recorded files that are missing or have another content.

    All are read: a record states their hashes, and a file changed in place may keep its size.
    """

    def is_changed(item: tuple[str, dict]) -> bool:
        name, record = item
        try:
            path = directory / name
            if not path.is_file() or path.stat().st_size != record["bytes"]:
                return True
            return file_hash(path) != record["sha256"]
        except (LookupError, TypeError, ValueError):  # the record is damaged
            return True

    if not isinstance(files, dict):
        return [directory]
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter
        changed = pool.map(is_changed, files.items())
    return [directory / name for name, is_one in zip(files, changed, strict=True) if is_one]


def build_stage(directory: Path, fingerprint: str, build: Callable[[Path], dict]) -> dict:
    """Build a stage unless it is finished, and return its record.

    The record has what `build` returned ("result"), and the size and sha256 of every file
    ("files"). `build(folder)` is called only if `directory` is not a finished stage of the same
    `fingerprint`; it fills a temporary folder, which then replaces `directory`. The caller holds a
    lock that keeps others from building the same stage.
    """
    record = read_json(directory / RECORD)
    if (
        record is not None
        and record.get("fingerprint") == fingerprint
        and isinstance(record.get("result"), dict)
        and not changed_files(directory, record.get("files"))
    ):
        return record
    for abandoned in directory.parent.glob(f"{directory.name}.*.partial"):
        shutil.rmtree(abandoned)
    # A name of its own: a killed preparation's child processes may still be writing to theirs.
    partial = directory.with_name(f"{directory.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    log.info("making %s", directory)
    result = build(partial)
    files = {
        path.relative_to(partial).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": file_hash(path),
        }
        for path in sorted(partial.rglob("*"))
        if path.is_file()
    }
    record = {"fingerprint": fingerprint, "result": result, "files": files}
    write_json(partial / RECORD, record)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(partial, directory)
    return record
