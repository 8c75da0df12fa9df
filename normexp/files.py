"""Files that are written whole or not at all."""

import fcntl
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

_UNFINISHED = re.compile(r"(.+?)(\.[0-9a-f]{16})?\.part")
_NAME_BYTES = 200  # of the 255 that a file name may have


@contextmanager
def whole_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that takes the place of `path` when the block ends without an error.

    mode: "w" (UTF-8, newlines as written) or "wb". Until then, and after an error or a crash of the
    machine, `path` holds its old content. Processes that write the same path do not meet: the last
    one to end wins. What a killed process left is removed by the next one that writes the path.
    Raises OSError as open and write do.
    """
    remove_unfinished(path.parent, path.name)
    partial, descriptor = _create_beside(path)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(descriptor, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, path)  # before the lock ends with the descriptor
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, sorted and indented, whole or not at all."""
    with whole_file(path) as file:
        json.dump(value, file, indent=2, sort_keys=True, ensure_ascii=False)
        file.write("\n")


def remove_unfinished(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left of `whole_file`: for the file `name`, or for all there.

    What a living process is writing stays, and so does whatever cannot be removed.
    """
    wanted = None if name is None else _shortened(name)
    with suppress(OSError):
        for path in list(folder.iterdir()):
            unfinished = _UNFINISHED.fullmatch(path.name)
            if unfinished and wanted in (None, unfinished[1]):
                with suppress(OSError):
                    _remove_abandoned(path)


def open_own(path: Path, flags: int) -> int:
    """Open a regular file that no link stands for, and return its descriptor.

    A link in its place is removed: it may lead to a file of somebody else's. flags: of os.open.
    Raises OSError as os.open does, and FileExistsError for a folder or a device.
    """
    with suppress(FileNotFoundError):
        kind = path.lstat().st_mode
        if stat.S_ISLNK(kind):
            path.unlink()
        elif not stat.S_ISREG(kind):
            raise FileExistsError(f"{path} is no regular file")
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def _create_beside(path: Path) -> tuple[Path, int]:
    """Create a file of a new name, locked until its descriptor is closed."""
    while True:
        partial = path.with_name(f"{_shortened(path.name)}.{secrets.token_hex(8)}.part")
        # O_EXCL: neither somebody else's file nor what a link leads to. Not tempfile, whose files
        # nobody else may read.
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(partial, flags, 0o666)
        with suppress(OSError):  # a file system without locks: then nothing is taken for abandoned
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return partial, descriptor
        os.close(descriptor)  # another process took it for abandoned before it was locked


def _remove_abandoned(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
        return
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    finally:
        os.close(descriptor)


def _shortened(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:_NAME_BYTES])
