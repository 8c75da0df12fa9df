"""A user's text files as lines: UTF-8, plain or gzipped, with the line ends of any system."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import IO

from normexp.corpora.parallel_text import Row
from normexp.errors import UserError

_PACKED = {
    b"PK\x03\x04": "a zip archive",
    b"\xfd7zXZ\x00": "packed by xz",
    b"BZh": "packed by bzip2",
    b"\x28\xb5\x2f\xfd": "packed by zstd",
}
_UTF8_MARK = b"\xef\xbb\xbf"


class SourceText:
    """The lines of a text file, without line ends; iterate as often as needed.

    A byte order mark and the CR of Windows line ends are no part of a line.

    Raises UserError, with the number of the line, for what is not UTF-8 text.

    Attributes:
        windows_line_ends: Lines that ended with CR LF, after an iteration.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.windows_line_ends = 0

    def __iter__(self) -> Iterator[str]:
        self.windows_line_ends = 0
        number = 0
        try:
            with open_source(self.path) as file:
                for number, raw in enumerate(file, 1):
                    raw = raw.removesuffix(b"\n")
                    if raw.endswith(b"\r"):
                        self.windows_line_ends += 1
                        raw = raw.removesuffix(b"\r")
                    if number == 1:
                        raw = raw.removeprefix(_UTF8_MARK)
                    yield self._decoded(raw, number)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{self.path} is damaged behind line {number} ({error})") from None
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from None

    def _decoded(self, raw: bytes, number: int) -> str:
        if number == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(
                f"{self.path} is UTF-16; convert it: iconv -f UTF-16 -t UTF-8 {self.path} > NEW"
            )
        if b"\0" in raw:
            raise UserError(f"{self.path}, line {number}: a zero byte; this is not a text file")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path}, line {number}: not UTF-8 (byte {raw[error.start]:#04x} at column "
                f"{error.start + 1}); convert it, from Latin-1 for example: iconv -f ISO-8859-1 "
                f"-t UTF-8 {self.path} > NEW"
            ) from None


@contextmanager
def open_source(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked if it is gzipped, whatever its name.

    Raises UserError for a file that is packed in another way.
    """
    with path.open("rb") as file:
        start = file.read(6)
        for mark, what in _PACKED.items():
            if start.startswith(mark):
                raise UserError(f"{path} is {what}; unpack it first (.gz is read as it is)")
        file.seek(0)
        if start.startswith(b"\x1f\x8b"):
            with gzip.open(file) as unpacked:
                yield unpacked
        else:
            yield file


def aligned(texts: list[SourceText]) -> Iterator[Row]:
    """Line i of every text. Raises UserError saying where if they differ in length."""
    missing = object()
    lengths = [0] * len(texts)
    last: list[str] = [""] * len(texts)
    for row in zip_longest(*texts, fillvalue=missing):
        for i, text in enumerate(row):
            if text is not missing:
                lengths[i] += 1
                last[i] = text
        if len(set(lengths)) == 1:
            yield row
    if len(set(lengths)) > 1:
        shortest = lengths.index(min(lengths))
        counts = " and ".join(
            f"{text.path} has {length:,} lines" for text, length in zip(texts, lengths, strict=True)
        )
        raise UserError(
            f"the texts are not aligned: {counts}; line i of one must be the translation of line i "
            f"of the other. The shorter one ends with line {lengths[shortest]:,}: "
            f"{last[shortest][:60]!r}"
        )
