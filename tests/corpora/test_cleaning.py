"""The length filter against its specification, by brute force and on real text."""

import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normexp.corpora.cleaning import Cleaner, clean_pair

LIMITS = {"max_ratio": 1.5, "min_words": 1, "max_words": 6}
TEXT = st.text(alphabet="ab| \t\u00a0\u2028", max_size=25)


def words_by_hand(text: str) -> list[str]:
    """Maximal runs of characters that are neither blank nor a bar, bars not separating."""
    words, word = [], ""
    for character in text.replace("|", "") + " ":
        if character in " \t\u00a0\u2028":
            words += [word] if word else []
            word = ""
        else:
            word += character
    return words


@given(TEXT, TEXT)
def test_agrees_with_brute_force(source: str, target: str) -> None:
    cleaned = clean_pair(source, target, **LIMITS, factored=False)
    source_words, target_words = words_by_hand(source), words_by_hand(target)
    short, long = sorted([len(source_words), len(target_words)])
    # 1.5 is a ratio of integers, so that no rounding is needed here.
    if short >= 1 and long <= 6 and 2 * long <= 3 * short:
        assert cleaned == (" ".join(source_words), " ".join(target_words))
    else:
        assert cleaned is None


@pytest.mark.parametrize(
    ("source", "target", "kept"),
    [
        *((4, 6, True), (6, 4, True)),  # exactly the largest ratio
        *((3, 5, False), (5, 3, False)),
        *((6, 6, True), (6, 7, False), (7, 6, False), (7, 7, False)),  # the longest
    ],
)
def test_limits_are_included(source: int, target: int, kept: bool) -> None:
    """Numbers of words at the limits, which random texts seldom meet."""
    pair = " ".join("a" * source), " ".join("b" * target)
    assert (clean_pair(*pair, **LIMITS, factored=False) == pair) is kept


@given(st.lists(st.tuples(TEXT, TEXT)))
def test_other_columns_share_the_fate_of_their_row(pairs: list[tuple[str, str]]) -> None:
    pairs = [("a", "a"), *pairs]  # the first pair decides that "|" means nothing
    rows = [(*pair, str(number)) for number, pair in enumerate(pairs)]
    kept = list(Cleaner(**LIMITS).clean_rows(rows))
    alone = [clean_pair(*pair, **LIMITS, factored=False) for pair in pairs]
    assert kept == [(*pair, str(n)) for n, pair in enumerate(alone) if pair is not None]


@pytest.mark.parametrize(
    ("length", "kept"), [(1000, True), (1001, False)], ids=["longest word", "longer word"]
)
def test_overlong_word(length: int, kept: bool) -> None:
    pair = ("x" * length, "y")
    assert (clean_pair(*pair, **LIMITS, factored=False) == pair) is kept


def test_bars_of_factored_text_stay() -> None:
    rows = [("a|b", "c"), ("d|e", "f")]
    assert list(Cleaner(**LIMITS).clean_rows(rows)) == rows
    assert list(Cleaner(**LIMITS).clean_rows([("x", "y"), *rows])) == [
        ("x", "y"),
        ("ab", "c"),
        ("de", "f"),
    ]
    with pytest.raises(ValueError, match="blank factor"):
        list(Cleaner(**LIMITS).clean_rows([("a |b", "c d")]))


def test_no_rows() -> None:
    assert list(Cleaner(**LIMITS).clean_rows([])) == []


def test_counts_of_the_original_script(local_data) -> None:
    """clean-corpus-n.perl kept so many of Multi30k's 29,000 raw training pairs."""
    columns = []
    for language in ("de", "en"):
        content = gzip.decompress((local_data / "multi30k" / f"train.{language}.gz").read_bytes())
        columns.append(content.decode().split("\n")[:-1])
    pairs = list(zip(*columns, strict=True))
    assert len(list(Cleaner(max_ratio=1.5, min_words=1, max_words=175).clean_rows(pairs))) == 28_112
    assert len(list(Cleaner(max_ratio=1.2, min_words=5, max_words=20).clean_rows(pairs))) == 20_070
