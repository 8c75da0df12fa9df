"""The text that the benchmark of the preparation prepares."""

import statistics

import pytest

from normexp.benchmarks.wmt_like import pairs, word


@pytest.mark.parametrize("language", ["en", "de"])
def test_ranks_have_words_of_their_own_and_rare_ones_are_longer(language: str) -> None:
    words = [word(rank, language).lower() for rank in range(40_000)]
    assert len(set(words)) == len(words)
    assert max(map(len, words[:100])) < statistics.mean(map(len, words[-100:]))


def test_text_has_the_lengths_of_the_real_one() -> None:
    rows = list(pairs(1, 1500))
    assert rows == list(pairs(1, 1500)) != list(pairs(2, 1500))
    for column in zip(*rows, strict=True):
        lengths = [len(line.split()) for line in column]
        assert 22 < statistics.mean(lengths) < 30
        assert 0.005 < sum(length > 80 for length in lengths) / len(rows) < 0.05
    assert all("\n" not in text for row in rows for text in row)
