"""Stages of a preparation: a folder is either finished, with its record inside, or not there."""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from normexp.corpora.hashing import file_hash
from normexp.files import write_json

log = logging.getLogger(__name__)
RECORD = "stage.json"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; waits for a process that holds it.

    The lock goes with the process, so a killed one leaves nothing to clean up.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        # Not flock: child processes inherit that one, and those of a killed process can outlive it.
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            log.info("another process is preparing this corpus; waiting for it (%s)", path)
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def read_json(path: Path) -> dict | None:
    """The content of `path`, or None if it is absent or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def files_intact(directory: Path, files: dict[str, dict]) -> bool:
    """Whether every recorded file is there with its recorded size."""
    return all(
        (directory / name).is_file() and (directory / name).stat().st_size == record["bytes"]
        for name, record in files.items()
    )


def build_stage(directory: Path, fingerprint: str, build: Callable[[Path], dict]) -> dict:
    """The record of a finished stage: what `build` returned, and size and sha256 of every file.

    `build(folder)` is called only if `directory` is not a finished stage of the same
    `fingerprint`; it fills a folder of another name, which takes its place when complete. The
    caller holds a lock that keeps others from building the same stage.
    """
    record = read_json(directory / RECORD)
    if (
        record is not None
        and record.get("fingerprint") == fingerprint
        and files_intact(directory, record["files"])
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
