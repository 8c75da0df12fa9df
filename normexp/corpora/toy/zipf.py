"""Zipf-distributed choice that yields the same draws on every machine and Python version."""

from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate
from random import Random
from typing import Generic, TypeVar

T = TypeVar("T")


class Zipf(Generic[T]):
    """A list whose item of rank r = 1, 2, ... is drawn with probability ∝ 1 / (r + offset).

    Source: Mandelbrot's generalisation of Zipf's law with exponent 1. A larger offset flattens
    the head, which bounds how rare the last item can get. The exponent is fixed because
    division is exactly rounded everywhere, `pow` is not; and of `random.Random` only
    `random()` is used, the one method whose sequence Python promises never to change.
    """

    def __init__(self, items: Sequence[T], offset: float = 0.0) -> None:
        if not items:
            raise ValueError("a Zipf distribution needs at least one item")
        self.items = tuple(items)
        weights = [1.0 / (rank + offset) for rank in range(1, len(self.items) + 1)]
        # Not sum(): from Python 3.12 on it rounds differently.
        self._cumulative = list(accumulate(weights))
        self.probabilities = tuple(weight / self._cumulative[-1] for weight in weights)

    def index(self, rng: Random) -> int:
        """Draw a position in `items`; takes exactly one `rng.random()`."""
        point = rng.random() * self._cumulative[-1]
        return bisect(self._cumulative, point, hi=len(self.items) - 1)

    def draw(self, rng: Random) -> T:
        """Draw an item; takes exactly one `rng.random()`."""
        return self.items[self.index(rng)]
