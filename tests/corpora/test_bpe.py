"""Codes and segmentations against subword-nmt left as it is."""

import io
from collections import Counter

import subword_nmt.learn_bpe
from hypothesis import given, settings
from hypothesis import strategies as st
from subword_nmt.apply_bpe import BPE

from normexp.benchmarks.wmt_like import pairs
from normexp.corpora import segmentation
from normexp.corpora.bpe import _Words, learn_codes

# Few letters and long words: the same string then arises from different merges, and pairs repeat
# within words, which is where the library's bookkeeping has peculiarities.
WORDS = st.text(alphabet="ab", min_size=1, max_size=14) | st.text(alphabet="abcé", min_size=1)


def codes_of(lines: list[str], merges: int) -> str:
    codes = io.StringIO()
    learn_codes(lines, codes, merges, progress=False)
    return codes.getvalue()


def stock_codes(lines: list[str], merges: int) -> str:
    codes = io.StringIO()
    subword_nmt.learn_bpe.learn_bpe(lines, codes, merges)
    return codes.getvalue()


@given(st.lists(st.lists(WORDS, min_size=1).map(" ".join), min_size=1, max_size=30))
@settings(max_examples=100)
def test_codes_are_those_of_the_library(lines: list[str]) -> None:
    lines = [*lines, "xy xy"]  # without any pair the library fails
    assert codes_of(lines, 60) == stock_codes(lines, 60)


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([1, -1]))))
def test_log_counts_as_a_dictionary_does(changes: list[tuple[int, int]]) -> None:
    log, counts = _Words(), Counter()
    for number, change in changes:
        log[number] += change
        counts[number] += change
    assert dict(log.items()) == counts


def test_codes_of_text_with_many_words() -> None:
    """Enough merges for the library to prune its statistics and to fall back to the full ones."""
    lines = [line for pair in pairs(3, 150) for line in pair]
    assert codes_of(lines, 1500) == stock_codes(lines, 1500)


def test_segmentation_with_a_full_cache(monkeypatch) -> None:
    lines = [line for pair in pairs(4, 60) for line in pair]
    codes = codes_of(lines, 200)
    stock = BPE(io.StringIO(codes))
    monkeypatch.setattr(segmentation, "_MAX_WORDS", 5)
    segmenter = segmentation.BpeSegmenter(codes, 1)
    for line in lines:
        assert segmenter([[line]]) == [[stock.process_line(line)], [line]]
        assert set(segmenter._pieces) == set(line.split())
