"""How frequent pairs of symbols are and in which words they occur, as subword-nmt counts it.

The library looks for the most frequent pair among those above a threshold only, and forgets some of
what happens to the others meanwhile. The codes depend on that, so it is done alike here.
"""

from array import array

import numpy as np


def pair_key(left: int, right: int) -> int:
    """One number for a pair of symbols; also of arrays of 64 bits."""
    return left << 32 | right


def symbols_of(key: int) -> tuple[int, int]:
    """The pair of symbols of a key."""
    return key >> 32, key & 0xFFFFFFFF


class PairFrequencies:
    """Frequencies of pairs, most of them out of sight, and logs of the words that pairs occur in.

    A pair has a key, see `pair_keys`, and inside this class a number, its place in the arrays.
    """

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}  # of keys
        # These five have more places than there are pairs, for those to come.
        self._keys = np.zeros(1024, np.int64)
        self._frequencies = np.zeros(1024, np.int64)  # zero out of sight
        self._hidden_frequencies = np.zeros(1024, np.int64)
        self._in_sight = np.zeros(1024, bool)
        self._newest_segments = np.full(1024, -1, np.int64)
        # Those in sight that have been at the threshold or above: the most frequent is among them.
        self._threshold = 1.0
        self._candidates = np.zeros(0, np.int64)
        # A pair's log is a chain of segments of this one: begin, end, the segment before.
        self._log = array("i")
        self._begins, self._ends, self._before = array("q"), array("q"), array("q")

    def add(self, keys: np.ndarray, words: np.ndarray, changes: np.ndarray) -> None:
        """Change frequencies, and log that a pair occurs in a word once more, or less.

        changes: those of the frequencies; the sign says whether more or less.
        """
        if not len(keys):
            return
        order = np.argsort(keys, kind="stable")
        keys, words, changes = keys[order], words[order], changes[order]
        begins = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
        pairs = self._numbers_of(keys[begins].tolist())
        self._change(pairs, np.add.reduceat(changes, begins))
        first, offset = len(self._begins), len(self._log)
        self._log.frombytes(np.where(changes < 0, ~words, words).astype(np.int32).tobytes())
        self._begins.frombytes((begins + offset).tobytes())
        self._ends.frombytes((np.append(begins[1:], len(keys)) + offset).tobytes())
        self._before.frombytes(self._newest_segments[pairs].tobytes())
        self._newest_segments[pairs] = np.arange(first, first + len(pairs))

    def add_frequencies(self, changes: dict[int, int]) -> None:
        """Change frequencies of keys whose words are logged elsewhere."""
        if changes:
            pairs = self._numbers_of(list(changes))
            self._change(pairs, np.array(list(changes.values()), np.int64))

    def words_of(self, key: int) -> np.ndarray:
        """The words in which a pair occurs according to its log, which is emptied."""
        (pair,) = self._numbers_of([key])
        segment = int(self._newest_segments[pair])
        self._newest_segments[pair] = -1
        log = np.frombuffer(self._log, np.int32)
        entries = [log[:0]]
        while segment >= 0:
            entries.append(log[self._begins[segment] : self._ends[segment]])
            segment = self._before[segment]
        joined = np.concatenate(entries)
        del log, entries  # the array cannot grow while others look at its memory
        less = joined < 0
        words, places = np.unique(np.where(less, ~joined, joined), return_inverse=True)
        return words[np.bincount(places, np.where(less, -1, 1), len(words)) >= 1]

    def forget(self, key: int) -> None:
        """Make a pair's frequency zero."""
        self._frequencies[self._numbers[key]] = 0

    def highest(self) -> tuple[int, np.ndarray]:
        """The highest frequency at or above the threshold and its pairs' keys; 0 without one."""
        if not len(self._candidates):
            return 0, self._candidates
        frequencies = self._frequencies[self._candidates]
        highest = int(frequencies.max())
        return highest, self._keys[self._candidates[frequencies == highest]]

    def remember(self) -> None:
        """Take the present frequencies for those with which the pairs went out of sight."""
        self._hidden_frequencies[:] = self._frequencies

    def hide(self, threshold: float) -> None:
        """Put pairs below the threshold out of sight."""
        self._threshold = threshold
        pairs = np.flatnonzero(self._in_sight)
        frequencies = self._frequencies[pairs]
        below = frequencies < threshold
        self._candidates = pairs[~below]
        pairs, frequencies = pairs[below], frequencies[below]
        # What was counted since a pair was hidden is a change. The library sees that where it is
        # negative and otherwise takes it for the whole frequency.
        self._hidden_frequencies[pairs] = np.where(
            frequencies < 0, self._hidden_frequencies[pairs] + frequencies, frequencies
        )
        self._frequencies[pairs] = 0
        self._in_sight[pairs] = False

    def show(self) -> int:
        """Bring all pairs back into sight; return the highest frequency."""
        known = slice(len(self._numbers))
        hidden = ~self._in_sight[known]
        self._frequencies[known][hidden] = self._hidden_frequencies[known][hidden]
        self._in_sight[known] = True
        return int(self._frequencies[known].max())

    def _change(self, pairs: np.ndarray, changes: np.ndarray) -> None:
        before = self._frequencies[pairs]
        after = before + changes
        self._frequencies[pairs] = after
        self._in_sight[pairs] = True
        # A pair that falls and rises again is listed twice, which does no harm.
        new = pairs[(after >= self._threshold) & (before < self._threshold)]
        if len(new):
            self._candidates = np.append(self._candidates, new)

    def _numbers_of(self, keys: list[int]) -> np.ndarray:
        numbers = self._numbers
        pairs = np.array([numbers.setdefault(key, len(numbers)) for key in keys])
        if len(numbers) > len(self._keys):
            more = len(numbers)
            self._keys = np.append(self._keys, np.zeros(more, np.int64))
            self._frequencies = np.append(self._frequencies, np.zeros(more, np.int64))
            self._hidden_frequencies = np.append(self._hidden_frequencies, np.zeros(more, np.int64))
            self._in_sight = np.append(self._in_sight, np.zeros(more, bool))
            self._newest_segments = np.append(self._newest_segments, np.full(more, -1, np.int64))
        self._keys[pairs] = keys
        return pairs
