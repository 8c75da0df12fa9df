"""Codes and segmentations against subword-nmt left as it is."""

import gzip
import io

import pytest
import subword_nmt.learn_bpe
from hypothesis import given, settings
from hypothesis import strategies as st
from subword_nmt.apply_bpe import BPE

from normexp.benchmarks.wmt_like import pairs
from normexp.corpora import bpe, segmentation
from normexp.corpora.bpe import learn_codes
from normexp.corpora.bpe_frequencies import PairFrequencies

# Few letters and long words: the same string then arises from different merges, and pairs repeat
# within words, which is where the library's bookkeeping has peculiarities. Other blanks inside a
# word are ends of symbols to the library, and "</w>" may be part of a word.
WORDS = st.one_of(
    st.text(alphabet="ab", min_size=1, max_size=14),
    st.text(alphabet="abcé", min_size=1),
    st.text(alphabet="ab\u00a0", min_size=1),
    st.text(alphabet="a</w>", min_size=1),
)


def codes_of(lines: list[str], merges: int) -> str:
    codes = io.StringIO()
    learn_codes(lines, codes, merges, progress=False)
    return codes.getvalue()


def stock_codes(lines: list[str], merges: int) -> str:
    codes = io.StringIO()
    subword_nmt.learn_bpe.learn_bpe(lines, codes, merges)
    return codes.getvalue()


@given(st.lists(st.lists(WORDS, min_size=1).map(" ".join), min_size=1, max_size=30))
@settings(max_examples=200)
def test_codes_are_those_of_the_library(lines: list[str]) -> None:
    lines = [*lines, "xy xy"]  # without any pair the library fails
    assert codes_of(lines, 60) == stock_codes(lines, 60)


def test_codes_of_text_with_many_words(monkeypatch) -> None:
    """Enough merges for the library to prune its statistics and to fall back to the full ones."""
    shown = []
    show = PairFrequencies.show
    monkeypatch.setattr(PairFrequencies, "show", lambda self: shown.append(1) or show(self))
    monkeypatch.setattr(bpe, "_WORDS_AT_ONCE", 700)
    lines = [line for pair in pairs(3, 150) for line in pair]
    assert codes_of(lines, 1500) == stock_codes(lines, 1500)
    assert shown


def test_codes_of_real_text(local_data) -> None:
    content = gzip.decompress((local_data / "multi30k" / "val.de.gz").read_bytes())
    lines = content.decode().split("\n")[:-1]
    codes = codes_of(lines, 20_000)
    assert codes == stock_codes(lines, 20_000)
    assert codes.count("\n") < 10_000, "no pair is left that occurs twice"


def test_no_pair_to_merge() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        codes_of(["a b", ""], 5)


IRREGULAR = st.lists(
    st.sampled_from(["ab", "abba", "b", " ", "  ", "\u00a0", "\t", "\r"]), max_size=8
).map("".join)


@given(st.lists(IRREGULAR, max_size=5))
def test_segmentation_is_that_of_the_library(lines: list[str]) -> None:
    codes = codes_of(["ab abba ab bab"], 4)
    stock = BPE(io.StringIO(codes))
    segmented, same = segmentation.BpeSegmenter(codes, 1)([lines])
    assert same == lines
    assert segmented == [stock.process_line(line) for line in lines]


def test_segmentation_with_a_full_cache(monkeypatch) -> None:
    lines = [line for pair in pairs(4, 60) for line in pair]
    codes = codes_of(lines, 200)
    stock = BPE(io.StringIO(codes))
    monkeypatch.setattr(segmentation, "_MAX_WORDS", 5)
    segmenter = segmentation.BpeSegmenter(codes, 1)
    for line in lines:
        assert segmenter([[line]]) == [[stock.process_line(line)], [line]]
        assert set(segmenter._pieces) == set(line.split())
