"""The words of a text as symbols' numbers, and the merging of a pair of symbols in many of them."""

from array import array
from collections.abc import Iterable, Sequence

import numpy as np

from normexp.corpora.bpe_frequencies import pair_key, symbols_of

END_OF_WORD = "</w>"
_LAST = 1 << 21  # above all characters
Changes = tuple[np.ndarray, np.ndarray, np.ndarray]


class Symbols:
    """Numbers of symbols."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._numbers: dict[str, int] = {}
        self._starts = array("Q")  # the first eight bytes, which are ordered as characters are

    def number_of(self, name: str) -> int:
        """The number of a symbol, known or new."""
        number = self._numbers.setdefault(name, len(self.names))
        if number == len(self.names):
            self.names.append(name)
            self._starts.append(int.from_bytes(name.encode()[:8].ljust(8, b"\0"), "big"))
        return number

    def last_pair(self, keys: np.ndarray) -> tuple[int, int]:
        """That of the pairs which is last in the order of their names."""
        starts = np.frombuffer(self._starts, np.uint64)[keys >> 32]
        candidates = map(symbols_of, keys[starts == starts.max()].tolist())
        return max(candidates, key=lambda pair: (self.names[pair[0]], self.names[pair[1]]))


class SymbolWords:
    """Words as symbols, at first their characters, the last of which is marked.

    The symbols of all words lie in one array; those of a word begin where they began at first, and
    become fewer.
    """

    def __init__(self, words: Sequence[str], frequencies: Iterable[int], symbols: Symbols) -> None:
        self._frequencies = np.fromiter(frequencies, np.int64, len(words))
        self._lengths = np.fromiter(map(len, words), np.int64, len(words))
        ends = np.cumsum(self._lengths)
        self._begins = ends - self._lengths
        characters = np.frombuffer("".join(words).encode("utf-32-le"), np.uint32).copy()
        characters[ends - 1] += _LAST
        numbers = np.zeros(2 * _LAST, np.int64)
        numbers[characters] = 1
        for character in np.flatnonzero(numbers).tolist():
            name = chr(character % _LAST) + (END_OF_WORD if character >= _LAST else "")
            numbers[character] = symbols.number_of(name)
        self._symbols = numbers[characters].astype(np.int32)

    def __len__(self) -> int:
        return len(self._lengths)

    def pairs(self, words: range) -> Changes:
        """The pairs of neighbours in some words: keys, words and frequencies."""
        begin, end = self._begins[words.start], self._begins[words[-1]] + self._lengths[words[-1]]
        symbols = self._symbols[begin:end]
        owners = np.repeat(np.arange(words.start, words.stop), self._lengths[words])
        inside = owners[:-1] == owners[1:]
        owners = owners[:-1][inside]
        keys = pair_key(symbols[:-1][inside].astype(np.int64), symbols[1:][inside])
        return keys, owners, self._frequencies[owners]

    def merge(self, words: np.ndarray, left: int, right: int, merged: int) -> Changes:
        """Make `merged` of `left` and `right`, from left to right, in the words of these numbers.

        Returns what subword-nmt then changes in its statistics: keys of pairs, the words, and their
        frequencies, negative where pairs occur less often. Where a word had `merged` already, or
        does not have the pair, these are not the true changes.
        """
        lengths = self._lengths[words]
        ends = np.cumsum(lengths)
        places = np.arange(ends[-1]) + np.repeat(self._begins[words] - ends + lengths, lengths)
        owners = np.repeat(np.arange(len(words)), lengths)
        is_last = np.zeros(len(places) + 1, bool)
        is_last[ends - 1] = True
        is_first = np.zeros(len(places), bool)
        is_first[ends - lengths] = True
        symbols = np.append(self._symbols[places], np.int64([-1, -1]))  # two more to look ahead to

        found = np.flatnonzero((symbols[:-3] == left) & (symbols[1:-2] == right) & ~is_last[:-2])
        if left == right and len(found):
            found = _without_overlaps(found)
        behind = found[~is_first[found]]
        ahead = found[~is_last[found + 1]] + 2
        # The pair that comes next takes the neighbour between away itself.
        ahead = ahead[(symbols[ahead] != left) | is_last[ahead] | (symbols[ahead + 1] != right)]
        changes = [
            (symbols[behind - 1], symbols[behind], owners[behind], -1),
            (symbols[ahead - 1], symbols[ahead], owners[ahead], -1),
        ]

        symbols[found] = merged
        is_last[found] = is_last[found + 1]
        stays = np.ones(len(places), bool)
        stays[found + 1] = False
        symbols, is_last = symbols[:-2][stays], is_last[:-1][stays]
        is_first, new_owners = is_first[stays], owners[stays]
        new = np.flatnonzero(symbols == merged)
        behind = new[~is_first[new]]
        ahead = new[~is_last[new]] + 1
        ahead = ahead[symbols[ahead] != merged]
        changes += [
            (symbols[behind - 1], symbols[behind], new_owners[behind], 1),
            (symbols[ahead - 1], symbols[ahead], new_owners[ahead], 1),
        ]

        lengths = lengths - np.bincount(owners[found], minlength=len(words))
        ends = np.cumsum(lengths)
        places = np.arange(ends[-1]) + np.repeat(self._begins[words] - ends + lengths, lengths)
        self._symbols[places] = symbols
        self._lengths[words] = lengths

        keys = np.concatenate([pair_key(one, other) for one, other, _, _ in changes])
        changed = words[np.concatenate([places for _, _, places, _ in changes])]
        signs = np.repeat(
            [sign for *_, sign in changes], [len(places) for _, _, places, _ in changes]
        )
        return keys, changed, signs * self._frequencies[changed]


def _without_overlaps(found: np.ndarray) -> np.ndarray:
    """Of places that follow each other every other one, beginning with the first."""
    runs = np.flatnonzero(np.append(True, np.diff(found) != 1))
    lengths = np.diff(np.append(runs, len(found)))
    return found[(np.arange(len(found)) - np.repeat(runs, lengths)) % 2 == 0]
