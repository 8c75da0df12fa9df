"""The checks of a user's text, line by line."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tqdm import tqdm

from normexp.corpora.parallel_text import Row
from normexp.errors import UserError

SPECIAL = ("<s>", "<pad>", "</s>")
"""Marks of fairseq's dictionaries that a text must not hold as tokens; <unk> it may."""

SHOWN = 5  # line numbers in a message


@dataclass
class RowChecks:
    """What is refused, left out or noted of the rows of a corpus.

    in_tokens: blanks separate tokens, among which fairseq's marks are refused. drop_empty: leave
    out pairs with an empty side instead of refusing them. max_words: longer pairs are left out of
    train. notes: what was left out, and what the user should know.
    """

    in_tokens: bool
    drop_empty: bool
    max_words: int
    notes: list[str] = field(default_factory=list)

    def passed(self, split: str, where: str, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows that are kept. Raises UserError, behind the last row, for what is refused."""
        empty, special, long, blank = _Lines(), _Lines(), _Lines(), _Lines()
        shown = tqdm(rows, split, unit=" lines", disable=not sys.stderr.isatty())
        for number, row in enumerate(shown, 1):
            if self.in_tokens and any(mark in text.split() for text in row for mark in SPECIAL):
                special.add(number)
            if not all(text.strip() for text in row):
                (empty if len(row) > 1 else blank).add(number)
                if len(row) > 1:
                    continue
            elif split == "train" and len(row) > 1 and any(map(self._is_too_long, row)):
                long.add(number)
                continue
            yield row
        if special.count:
            raise UserError(
                f"{where}: {special} with {', '.join(SPECIAL[:-1])} or {SPECIAL[-1]} as a token, "
                "which fairseq takes for a mark of its own: remove them (the end of a sentence is "
                "added later)"
            )
        if empty.count and not self.drop_empty:
            raise UserError(
                f"{where}: {empty} with an empty side. Fill or remove them on both sides, or add "
                "--drop-empty to leave these pairs out"
            )
        if empty.count:
            self.notes.append(f"{split}: left out {empty} with an empty side")
        if long.count:
            self.notes.append(
                f"{split}: left out {long} longer than {self.max_words} words (--max-words)"
            )
        if blank.count:
            self.notes.append(
                f"{split}: {blank.count:,} blank lines are kept; in the perplexity each counts as "
                "one token, the end of a line"
            )

    def _is_too_long(self, text: str) -> bool:
        # Where no blanks are written, ten characters are taken for a word.
        return len(text.split()) > self.max_words or len(text) > 10 * self.max_words


class _Lines:
    """How many lines there are of some kind, and the numbers of the first."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[int] = []

    def add(self, number: int) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(number)

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.first) else ""
        noun = "line" if self.count == 1 else "lines"
        return f"{self.count:,} {noun} ({', '.join(f'{n:,}' for n in self.first)}{more})"
