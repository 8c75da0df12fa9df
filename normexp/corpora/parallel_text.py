"""Parallel text files as one stream of rows."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from normexp.corpora.raw_text import lines
from normexp.errors import UserError

Row = tuple[str, ...]


def open_text(path: Path, mode: str = "r") -> IO[str]:
    """Open UTF-8 text in which only ``\\n`` ends a line: corpora hold lone CR and U+2028."""
    return path.open(mode, encoding="utf-8", newline="\n")


def read_rows(paths: list[Path]) -> Iterator[Row]:
    """Line i of every file, without line ends. Raises UserError if the files' lengths differ."""
    with ExitStack() as stack:
        columns = [lines(stack.enter_context(open_text(path))) for path in paths]
        yield from zip_texts(columns, [str(path) for path in paths])


def zip_texts(columns: list[Iterable[str]], names: list[str]) -> Iterator[Row]:
    """Rows of texts that belong together. Raises UserError naming them if lengths differ."""
    rows = zip(*columns, strict=True)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except ValueError as error:
            raise UserError(f"{' and '.join(names)} differ in their number of lines") from error
        yield row


@contextmanager
def row_writer(paths: list[Path]) -> Iterator[Callable[[Row], None]]:
    """A function that appends column j of a row to ``paths[j]``, which are created anew."""
    with ExitStack() as stack:
        files = []
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.append(stack.enter_context(open_text(path, "w")))

        def write(row: Row) -> None:
            for file, text in zip(files, row, strict=True):
                file.write(text + "\n")

        yield write


def write_rows(rows: Iterable[Row], paths: list[Path]) -> int:
    """Write column j of every row to ``paths[j]``; returns the number of rows."""
    number = 0
    with row_writer(paths) as write:
        for row in rows:
            write(row)
            number += 1
    return number
