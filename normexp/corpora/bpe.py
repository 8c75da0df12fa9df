"""subword-nmt's BPE: its codes to the letter, in less time and memory."""

import contextlib
import io
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import TextIO

import subword_nmt.learn_bpe

Pair = tuple[str, str]


class _Words:
    """How often a pair of symbols occurs in which words: a log of +1 and -1, summed on demand.

    Stands in for the library's dictionary from word number to count: four bytes for an occurrence
    instead of an entry of a dictionary. The library changes counts by one at a time, with
    ``words[number] += 1``, which here reads a zero and writes the change.
    """

    __slots__ = ("_log",)

    def __init__(self) -> None:
        self._log = array("i")

    def __getitem__(self, number: int) -> int:
        return 0

    def __setitem__(self, number: int, change: int) -> None:
        self._log.append(number if change > 0 else ~number)

    def items(self) -> Iterable[tuple[int, int]]:
        """(word number, count), in any order; zeros and negative counts too."""
        counts: Counter[int] = Counter()
        for entry in self._log:
            if entry < 0:
                counts[~entry] -= 1
            else:
                counts[entry] += 1
        return counts.items()


class _Index(dict[Pair, _Words]):
    """The words of each pair; assigning to a pair, as the library does after its merge, clears."""

    def __missing__(self, pair: Pair) -> _Words:
        super().__setitem__(pair, _Words())
        return self[pair]

    def __setitem__(self, pair: Pair, words: object) -> None:
        super().__setitem__(pair, _Words())


def _pair_statistics(
    vocabulary: list[tuple[tuple[str, ...], int]],
) -> tuple[defaultdict[Pair, int], _Index]:
    """Frequency of every pair of neighbouring symbols, and the words it occurs in."""
    frequencies: defaultdict[Pair, int] = defaultdict(int)
    index = _Index()
    for number, (symbols, frequency) in enumerate(vocabulary):
        for pair in pairwise(symbols):
            frequencies[pair] += frequency
            index[pair][number] += 1
    return frequencies, index


def _most_frequent(frequencies, key=None):
    """The library's ``max(frequencies, key=(frequency, pair))`` without a call for every pair."""
    if key is None:
        return max(frequencies)
    highest = max(frequencies.values())
    return max(pair for pair, frequency in frequencies.items() if frequency == highest)


@contextlib.contextmanager
def _lean() -> Iterator[None]:
    """Within this context the library uses the two replacements above."""
    module = subword_nmt.learn_bpe
    original = module.get_pair_statistics
    module.get_pair_statistics, module.max = _pair_statistics, _most_frequent
    try:
        yield
    finally:
        module.get_pair_statistics = original
        del module.max  # the built-in one is seen again


def learn_codes(lines: Iterable[str], codes: TextIO, merges: int, progress: bool) -> None:
    """Write the codes that ``subword-nmt learn-bpe -s MERGES`` learns from `lines`."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_lean())
        if not progress:  # the library always draws a progress bar
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        subword_nmt.learn_bpe.learn_bpe(lines, codes, merges)
