"""From archives to plain text: one sentence per line, UTF-8, only ``\\n`` ends a line.

Every reader yields the lines of one text without their line end. Archives are read as streams and
nothing is unpacked by the names they hold, so no archive can write outside the corpus folder.
"""

import gzip
import io
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from normexp.corpora.hashing import stream_hash
from normexp.errors import UserError

Entry = TypeVar("Entry", tarfile.TarInfo, zipfile.ZipInfo)

# Far above any text used here (the longest has 550 MB); stops a decompression bomb.
MAX_MEMBER_BYTES = 4 << 30


def lines(stream: Iterable[str]) -> Iterator[str]:
    """Every line, unchanged."""
    for line in stream:
        yield line.removesuffix("\n")


def ted_tags(stream: Iterable[str]) -> Iterator[str]:
    """The training text of IWSLT's TED talks, as in fairseq's prepare-iwslt14.sh.

    Lines with links, talk numbers and keywords are dropped. Of titles and descriptions only the
    tags are dropped; the text is a training pair.
    """
    for line in lines(stream):
        if not any(tag in line for tag in ("<url>", "<talkid>", "<keywords>")):
            yield re.sub(r"</?(?:title|description)>", "", line)


def segments(stream: Iterable[str]) -> Iterator[str]:
    """The ``<seg id=...>`` lines of an XML or SGML evaluation set, without tag and outer blanks."""
    for line in lines(stream):
        if "<seg id" in line:
            line = re.sub(r'<seg id="[0-9]*">\s*', "", line)
            yield re.sub(r"\s*</seg>\s*", "", line)


FORMATS = {"lines": lines, "ted_tags": ted_tags, "segments": segments}


@contextmanager
def open_member(path: Path, member: str) -> Iterator[Iterable[str]]:
    """Text stream of one member of an archive; a plain or gzipped text is its only member.

    `member` is the end of a path inside the archive, from a folder boundary on, and must fit one
    regular file exactly. Raises UserError otherwise, or if the archive is damaged.
    """
    with _open_bounded(path, member) as binary:
        try:
            with io.TextIOWrapper(binary, encoding="utf-8", newline="\n") as text:
                yield text
        except UnicodeDecodeError as error:
            raise UserError(f"{member} in {path} is not UTF-8 text: {error}") from error


def member_hash(path: Path, member: str, algorithm: str) -> str:
    """Hexadecimal digest of a member's bytes. Raises UserError as `open_member` does."""
    size = 0
    if algorithm == "git_blob":  # begins with the size
        with _open_bounded(path, member) as binary:
            while block := binary.read(1 << 20):
                size += len(block)
    with _open_bounded(path, member) as binary:
        return stream_hash(binary, algorithm, size)


@contextmanager
def _open_bounded(path: Path, member: str) -> Iterator[io.BufferedReader]:
    try:
        with _open_binary(path, member) as binary:
            yield io.BufferedReader(_Bounded(binary, f"{member} in {path}"))
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and prepare again") from error


class _Bounded(io.RawIOBase):
    """Passes reads through until more than MAX_MEMBER_BYTES have come."""

    def __init__(self, binary, name: str):
        self._binary, self._name, self._left = binary, name, MAX_MEMBER_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        block = self._binary.read(len(buffer))
        self._left -= len(block)
        if self._left < 0:
            raise UserError(f"{self._name} is larger than {MAX_MEMBER_BYTES} bytes unpacked")
        buffer[: len(block)] = block
        return len(block)


@contextmanager
def _open_binary(path: Path, member: str) -> Iterator[io.IOBase]:
    if path.name.endswith((".tgz", ".tar.gz", ".tar")):
        with tarfile.open(path) as archive:
            entry = _only([m for m in archive if _is_named(m.name, member)], path, member)
            if not entry.isreg():
                raise UserError(f"{member} in {path} is not a regular file")
            yield archive.extractfile(entry)
    elif path.name.endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            entry = _only([m for m in archive.infolist() if _is_named(m.filename, member)],
                          path, member)  # fmt: skip
            # A link in a zip file is a regular entry with the link's type in the Unix mode.
            if entry.is_dir() or (entry.external_attr >> 28) == 0xA:
                raise UserError(f"{member} in {path} is not a regular file")
            try:
                binary = archive.open(entry)
            except (NotImplementedError, RuntimeError) as error:  # encrypted, unknown compression
                raise zipfile.BadZipFile(str(error)) from None
            with binary:
                yield binary
    elif path.name.endswith(".gz"):
        with gzip.open(path) as binary:
            yield binary
    else:
        with path.open("rb") as binary:
            yield binary


def _is_named(name: str, member: str) -> bool:
    return f"/{name}".endswith(f"/{member}")


def _only(entries: list[Entry], path: Path, member: str) -> Entry:
    if len(entries) != 1:
        raise UserError(f"{path} holds {len(entries)} files named {member} instead of one")
    return entries[0]
