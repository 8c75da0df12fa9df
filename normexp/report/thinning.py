"""Curves of many points, thinned to what a screen shows."""

import math

COLUMNS = 800
"""Columns of pixels of the largest drawing."""

Point = tuple[int, float, float, float]
"""(update, mean, lowest, highest)"""


def thinned(points: list[Point]) -> list[Point]:
    """Return the points that decide what is drawn in each column of pixels, in their order.

    These are a column's first and last, those with an extreme value, and all that are not finite.
    Fewer points than two per column are returned as they are. points: in the order of updates.
    """
    if len(points) <= 2 * COLUMNS:
        return points
    first, last = points[0][0], points[-1][0]
    columns: dict[int, list[int]] = {}
    for number, point in enumerate(points):
        column = int((point[0] - first) / (last - first) * COLUMNS)
        columns.setdefault(column, []).append(number)
    kept: set[int] = set()
    for numbers in columns.values():
        kept |= {numbers[0], numbers[-1]}
        kept.update(n for n in numbers if not all(map(math.isfinite, points[n])))
        for value in (1, 2, 3):
            kept.add(min(numbers, key=lambda n: points[n][value]))
            kept.add(max(numbers, key=lambda n: points[n][value]))
    return [points[number] for number in sorted(kept)]
