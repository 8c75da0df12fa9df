"""clean-corpus-n.perl: drop sentence pairs that are empty, too long or too different in length."""

from collections.abc import Iterable, Iterator
from itertools import chain

import regex

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
    if _TOO_LONG_WORD.search(source) or _TOO_LONG_WORD.search(target):
        return None
    if " |" in source or " |" in target:
        raise ValueError(f"blank factor in: {source} / {target}")
    return source, target


def _squeezed(text: str, factored: bool) -> str:
    # regex's \s is Perl's; that of re has U+001C to U+001F as well.
    if not factored:
        text = text.replace("|", "")
    return regex.sub(r"\s+", " ", text).strip(" ")


def clean_rows(
    rows: Iterable[tuple[str, ...]], max_ratio: float, min_words: int, max_words: int
) -> Iterator[tuple[str, ...]]:
    """`clean_pair` over rows (source, target, further columns that share the row's fate)."""
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        return
    # The script decides on the first pair only whether "|" separates factors.
    factored = "|" in first[0] or "|" in first[1]
    for source, target, *others in chain([first], rows):
        pair = clean_pair(source, target, max_ratio, min_words, max_words, factored)
        if pair is not None:
            yield *pair, *others
