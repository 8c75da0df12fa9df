"""clean-corpus-n.perl: drop sentence pairs that are empty, too long or too different in length."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import regex

from normexp.corpora.parallel_text import Columns, Row

MAX_WORD_LENGTH = 1000  # characters
_TOO_LONG_WORD = regex.compile(rf"[^\s|]{{{MAX_WORD_LENGTH + 1}}}")


def clean_pair(
    source: str, target: str, max_ratio: float, min_words: int, max_words: int, factored: bool
) -> tuple[str, str] | None:
    """The pair as clean-corpus-n.perl writes it, or None where it drops the pair.

    Whitespace is squeezed and, unless `factored`, every ``|`` is deleted, in the output too.
    `min_words` and `max_words` are included, and so is a length ratio of exactly `max_ratio`.

    Raises ValueError for a blank before ``|`` in factored text.
    """
    source, target = (_squeezed(text, factored) for text in (source, target))
    if not source or not target:
        return None
    source_words, target_words = source.count(" ") + 1, target.count(" ") + 1
    if not (min_words <= source_words <= max_words and min_words <= target_words <= max_words):
        return None
    if target_words / source_words > max_ratio or source_words / target_words > max_ratio:
        return None
    if _has_too_long_word(source) or _has_too_long_word(target):
        return None
    if " |" in source or " |" in target:
        raise ValueError(f"blank factor in: {source} / {target}")
    return source, target


def _has_too_long_word(text: str) -> bool:
    return len(text) > MAX_WORD_LENGTH and _TOO_LONG_WORD.search(text) is not None


def _squeezed(text: str, factored: bool) -> str:
    # regex's \s is Perl's; that of re has U+001C to U+001F as well.
    if not factored:
        text = text.replace("|", "")
    if text.isprintable():  # then all its blanks are spaces
        return " ".join(text.split())
    return regex.sub(r"\s+", " ", text).strip(" ")


@dataclass
class Cleaner:
    """`clean_pair` over texts: source, target and further ones that share the fate of their row.

    factored: whether "|" separates factors. As in the script, the first pair of all decides.
    """

    max_ratio: float
    min_words: int
    max_words: int
    factored: bool | None = None

    def __call__(self, columns: Columns) -> Columns:
        """The texts without the rows that are dropped."""
        rows = zip(*columns, strict=True)
        kept = list(self.clean_rows(rows))
        return [list(lines) for lines in zip(*kept, strict=True)] if kept else [[] for _ in columns]

    def clean_rows(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows that are kept."""
        for source, target, *others in rows:
            if self.factored is None:
                self.factored = "|" in source or "|" in target
            pair = clean_pair(
                source, target, self.max_ratio, self.min_words, self.max_words, self.factored
            )
            if pair is not None:
                yield *pair, *others
