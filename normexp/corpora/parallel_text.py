"""Parallel text files as one stream of rows."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import IO

from tqdm import tqdm

from normexp.corpora.raw_text import lines
from normexp.errors import UserError

Row = tuple[str, ...]
Block = tuple[bytes, ...]  # some rows: their lines in every file, with line ends
Columns = list[list[str]]  # the same without line ends

BLOCK_ROWS = 1000


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
            raise UserError(_differing_lengths(names)) from error
        yield row


def _differing_lengths(names: Iterable[str]) -> str:
    return f"{' and '.join(names)} differ in their number of lines"


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


def read_blocks(paths: list[Path], title: str, progress: bool) -> Iterator[Block]:
    """The rows of `read_rows`, `BLOCK_ROWS` at a time. `progress` shows a bar with the title."""
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("rb")) for path in paths]
        bar = stack.enter_context(tqdm(desc=title, disable=not progress))
        while True:
            columns = [list(islice(file, BLOCK_ROWS)) for file in files]
            numbers = {len(lines) for lines in columns}
            if len(numbers) > 1:
                raise UserError(_differing_lengths(map(str, paths)))
            if numbers == {0}:
                return
            for lines in columns:
                lines[-1] = lines[-1].removesuffix(b"\n") + b"\n"  # also at the end of a file
            yield tuple(map(b"".join, columns))
            bar.update(numbers.pop())


def columns_of(block: Block) -> Columns:
    """The texts of a block."""
    return [text.decode().removesuffix("\n").split("\n") if text else [] for text in block]


def block_of(columns: Iterable[Iterable[str]]) -> Block:
    """The block of texts."""
    return tuple("".join([f"{line}\n" for line in lines]).encode() for lines in columns)


@contextmanager
def block_writer(paths: list[Path]) -> Iterator[Callable[[Block], None]]:
    """A function that appends column j of a block to ``paths[j]``, which are created anew."""
    with ExitStack() as stack:
        files = []
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.append(stack.enter_context(path.open("wb")))

        def write(block: Block) -> None:
            for file, text in zip(files, block, strict=True):
                file.write(text)

        yield write
