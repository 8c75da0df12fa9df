"""Pieces of words: segmenting text with BPE or sentencepiece, and joining pieces to words."""

import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

from subword_nmt.apply_bpe import BPE

from normexp.corpora.parallel_text import Columns
from normexp.errors import UserError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


# Of a dictionary, which is emptied then; frequent words soon return. 250 bytes each.
_MAX_WORDS = 1_000_000


@dataclass(frozen=True)
class BpeSegmenter:
    """Puts the BPE segmentations of the first columns of a block in front of its columns.

    codes: the text of subword-nmt's codes.
    """

    codes: str
    num_columns: int

    @cached_property
    def _bpe(self) -> BPE:
        return BPE(io.StringIO(self.codes))

    @cached_property
    def _pieces(self) -> dict[str, str]:
        """The pieces of words, joined by blanks; every process has its own."""
        return {}

    def __call__(self, columns: Columns) -> Columns:
        return [*map(self._segmented, columns[: self.num_columns]), *columns]

    def _segmented(self, lines: list[str]) -> list[str]:
        rows = [_words_of(line) for line in lines]
        self._learn(set(chain.from_iterable(rows)))
        pieces_of = self._pieces.__getitem__
        return [
            " ".join(map(pieces_of, words)) if words else self._bpe.process_line(line)
            for line, words in zip(lines, rows, strict=True)
        ]

    def _learn(self, words: set[str]) -> None:
        if len(self._pieces) + len(words) > _MAX_WORDS:
            self._pieces.clear()
        for word in words.difference(self._pieces):
            self._pieces[word] = " ".join(self._bpe.segment_tokens([word]))
        self._bpe.cache.clear()  # what the dictionary has, too


def _words_of(line: str) -> Sequence[str]:
    """The words of a line; none if there are blanks that the BPE keeps or squeezes."""
    if "  " in line or line != line.strip("\r\n "):
        return ()
    return line.split(" ") if line else ()


@dataclass(frozen=True)
class SentencePieceSegmenter:
    """Puts the pieces of the first columns of a block, joined by blanks, in front of its columns.

    model: the bytes of a sentencepiece model.
    """

    model: bytes
    num_columns: int

    @cached_property
    def _processor(self) -> "SentencePieceProcessor":
        return sentencepiece_processor(self.model)

    def __call__(self, columns: Columns) -> Columns:
        encode = self._processor.encode
        return [
            *(
                [" ".join(pieces) for pieces in encode(lines, out_type=str)]
                for lines in columns[: self.num_columns]
            ),
            *columns,
        ]


def sentencepiece_processor(model: bytes) -> "SentencePieceProcessor":
    """The processor of a model. Raises UserError without the library, or if it is no model."""
    try:
        from sentencepiece import SentencePieceProcessor  # optional
    except ImportError:
        raise UserError(
            "a sentencepiece model needs the library sentencepiece, which is not installed: "
            f"{sys.executable} -m pip install sentencepiece; or segment the text elsewhere and add "
            "it with --segmented sentencepiece"
        ) from None
    try:
        return SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise UserError(f"this is no sentencepiece model ({error})") from None


def check_codes(codes: str, name: str) -> None:
    """Raise UserError, with the line, unless `codes` is what ``subword-nmt learn-bpe`` writes."""
    first, _, rest = codes.partition("\n")
    lines = (rest if first.startswith("#version:") else codes).rstrip("\n").split("\n")
    offset = 2 if first.startswith("#version:") else 1
    for number, line in enumerate(lines, offset):
        columns = line.strip("\r\n ").split(" ")
        if len(columns) == 3 and columns[2].isdigit():
            raise UserError(
                f"{name}, line {number}: three columns, as fastBPE writes; in subword-nmt's form: "
                f"(echo '#version: 0.2'; cut -d' ' -f1,2 {name}) > bpe.codes"
            )
        if len(columns) != 2:
            raise UserError(
                f"{name}, line {number}: {line[:60]!r} is not a merge of subword-nmt's codes, two "
                "symbols with a blank between"
            )


def joined(line: str, marks: str | None) -> str:
    """The words of a line of pieces, as fairseq's post_process joins them.

    marks: "subword_nmt" (``@@`` ends a piece that goes on), "sentencepiece" (U+2581 begins a word)
    or None, where the line is words already.
    """
    if marks == "subword_nmt":
        return (line + " ").replace("@@ ", "").rstrip()
    if marks == "sentencepiece":
        return line.replace(" ", "").replace("\u2581", " ").strip()
    return line


MARKED: dict[str, Callable[[str], bool]] = {
    "sentencepiece": lambda token: "\u2581" in token,
    "subword_nmt": lambda token: token.endswith("@@") and len(token) > 2,
}
"""Whether a token bears the mark of a piece."""


def marks_in(tokens: list[str]) -> str | None:
    """Which of the `MARKED` marks more than one token, or type of a dictionary, in 100 bears."""
    for marks, bears in MARKED.items():
        if sum(map(bears, tokens)) * 100 > len(tokens):
            return marks
    return None
