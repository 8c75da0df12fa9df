"""Learning BPE: subword-nmt's codes to the letter, in less time and memory."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import chain
from typing import TextIO

import numpy as np
from subword_nmt.learn_bpe import get_pair_statistics, replace_pair, update_pair_statistics
from tqdm import tqdm

from normexp.corpora.bpe_frequencies import PairFrequencies, pair_key
from normexp.corpora.bpe_words import END_OF_WORD, Symbols, SymbolWords

_LEAST_FREQUENCY = 2  # of a pair that is merged
_WORDS_AT_ONCE = 200_000  # so that counting their pairs needs little memory


def learn_codes(lines: Iterable[str], codes: TextIO, merges: int, progress: bool) -> None:
    """Write the codes that ``subword-nmt learn-bpe -s MERGES`` learns from `lines`.

    Raises ValueError where no word has two characters, as the library does.
    """
    codes.write("#version: 0.2\n")
    text = _Text(lines)
    frequencies = text.frequencies
    highest, _ = frequencies.highest()
    if not highest:
        raise ValueError("a text in which no word has two characters has no pairs to merge")
    frequencies.remember()
    threshold = highest / 10
    for number in tqdm(range(merges), "learn BPE", disable=not progress):
        highest, keys = frequencies.highest()
        if number and highest < threshold:
            frequencies.hide(threshold)
            highest = frequencies.show()
            threshold = highest * number / (number + 10_000)
            frequencies.hide(threshold)
            _, keys = frequencies.highest()
        if highest < _LEAST_FREQUENCY:
            break
        codes.write("{} {}\n".format(*text.merge_last(keys)))
        if number % 100 == 0:
            frequencies.hide(threshold)


class _Text:
    """The words of a text as symbols, and how frequent pairs of symbols are in it."""

    def __init__(self, lines: Iterable[str]) -> None:
        vocabulary = _vocabulary(lines)
        # The library takes every blank inside a word for the end of a symbol when it merges.
        # Such words are few, and it merges them itself.
        odd = [word for word in vocabulary if _BLANK.search(word)]
        self._odd = [((*word[:-1], word[-1] + END_OF_WORD), vocabulary.pop(word)) for word in odd]
        statistics, self._odd_index = get_pair_statistics(self._odd)
        self._symbols = Symbols()
        self._words = SymbolWords(list(vocabulary), vocabulary.values(), self._symbols)
        self.frequencies = PairFrequencies()
        for begin in range(0, len(self._words), _WORDS_AT_ONCE):
            some = range(begin, min(begin + _WORDS_AT_ONCE, len(self._words)))
            self.frequencies.add(*self._words.pairs(some))
        self._add_odd(statistics)

    def merge_last(self, keys: np.ndarray) -> tuple[str, str]:
        """Make one symbol of the last of these pairs wherever it is, and return its names.

        It is where the library's statistics say so.
        """
        left, right = self._symbols.last_pair(keys)
        key, names = pair_key(left, right), (self._symbols.names[left], self._symbols.names[right])
        words = self.frequencies.words_of(key)
        if len(words):
            merged = self._symbols.number_of("".join(names))
            self.frequencies.add(*self._words.merge(words, left, right, merged))
        if names in self._odd_index:
            changed = replace_pair(names, self._odd, self._odd_index)
            changes = defaultdict(int)
            update_pair_statistics(names, changed, changes, self._odd_index)
            self._add_odd(changes)
        self.frequencies.forget(key)
        return names

    def _add_odd(self, changes: dict[tuple[str, str], int]) -> None:
        number_of = self._symbols.number_of
        self.frequencies.add_frequencies(
            {
                pair_key(number_of(left), number_of(right)): change
                for (left, right), change in changes.items()
            }
        )


_BLANK = re.compile(r"\s")


def _vocabulary(lines: Iterable[str]) -> Counter[str]:
    """How frequent each word is."""
    words = Counter(chain.from_iterable(line.strip("\r\n ").split(" ") for line in lines))
    words.pop("", None)
    return words
