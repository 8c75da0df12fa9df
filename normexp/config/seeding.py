"""Seeds of a run's random generators: one for each purpose, update, epoch and rank.

fairseq by itself seeds the masks of dropout with the seed plus the number of updates, and the order
of the batches with the seed plus the epoch. Then the run of seed 2 draws the masks of seed 1 one
update earlier and its orders one epoch earlier, and runs that are to be independent share nearly
all of their randomness. Here every generator has a seed of its own. None depends on the norm, so
that runs of one seed and different norms stay pairs.
"""

import functools
import hashlib
from dataclasses import dataclass
from typing import Literal

Seeding = Literal["fairseq", "separated"]

PURPOSES = ("initialization", "masks", "order")
"""Of the model's weights; of dropout and whatever else an update draws; of the batches."""

BITS = 31
"""Of a derived seed: generators on CPUs, torch's and NumPy's, take 32 bits and no sign."""
SEED_BITS, INDEX_BITS = 9, 20
_MASK = 2**BITS - 1
_ODD = 0x2C9277B5


@dataclass(frozen=True)
class Seeds:
    """The seeds of the run of one seed.

    seeding: "separated", or "fairseq" for what fairseq does by itself.
    """

    seed: int
    seeding: Seeding

    @property
    def are_separated(self) -> bool:
        return self.seeding == "separated"

    @property
    def initialization(self) -> int:
        """Return the seed with which the model is built."""
        return derived_seed(self.seed, "initialization") if self.are_separated else self.seed

    def masks(self, num_updates: int, rank: int = 0) -> int:
        """Return the seed of the update that comes after `num_updates` others, on a rank."""
        if self.are_separated:
            return derived_seed(self.seed, "masks", num_updates, rank)
        seed = self.seed + num_updates
        # Rank 0 has that of a single process. Bit 24, because torch's generator of the CPU uses the
        # lower 32 bits only.
        return (seed + (rank << 24)) % 2**32 if rank else seed

    def order(self, epoch: int) -> int:
        """Return the seed of an epoch's batches: what is in them, and their order."""
        return derived_seed(self.seed, "order", epoch) if self.are_separated else self.seed + epoch


def derived_seed(seed: int, purpose: str, index: int = 0, rank: int = 0) -> int:
    """Return the seed of a generator, at least 0 and below 2^31.

    On one rank no two of (seed, purpose, index) with seed < 2^9 and index < 2^20 have the same: a
    permutation of the 31-bit integers shuffles their concatenation. Greater seeds and indices, and
    other ranks, have permutations of their own; there two are equal by a chance of 2^-31.
    """
    seed_high, seed_low = divmod(seed, 2**SEED_BITS)
    index_high, index_low = divmod(index, 2**INDEX_BITS)
    value = PURPOSES.index(purpose) << SEED_BITS | seed_low
    value = value << INDEX_BITS | index_low
    for key in _keys(rank, seed_high, index_high):
        # Each line can be undone, hence a permutation.
        value ^= key
        value = value * _ODD & _MASK
        value ^= value >> (BITS // 2)
    return value


@functools.cache
def _keys(*of: int) -> tuple[int, ...]:
    digest = hashlib.sha256(repr(of).encode()).digest()
    return tuple(int.from_bytes(digest[start : start + 4]) & _MASK for start in range(0, 16, 4))
