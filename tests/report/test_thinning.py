"""A thinned curve looks like the whole one: equal extremes in every column of pixels."""

import math

from hypothesis import given
from hypothesis import strategies as st
from test_html_report import page_of

from normexp.report.thinning import COLUMNS, thinned

LOSSES = st.one_of(st.floats(0, 20), st.just(math.inf), st.just(math.nan))


@given(st.lists(st.tuples(LOSSES, LOSSES, LOSSES), min_size=1, max_size=30), st.integers(60, 200))
def test_every_column_keeps_its_ends_and_extremes(values, repeated: int) -> None:
    points = [(7 * n, *value) for n, value in enumerate(values * repeated)]
    kept = thinned(points)
    if len(points) <= 2 * COLUMNS:
        assert kept is points
        return
    assert kept == sorted(kept, key=lambda point: point[0])
    assert {id(point) for point in kept} <= {id(point) for point in points}
    assert kept[0] is points[0] and kept[-1] is points[-1]
    whole, thin = (_by_column(curve, points[-1][0]) for curve in (points, kept))
    assert whole.keys() == thin.keys()
    for column, own in whole.items():
        for value in (1, 2, 3):
            finite = [p[value] for p in own if all(map(math.isfinite, p))]
            left = [p[value] for p in thin[column] if all(map(math.isfinite, p))]
            if len(finite) == len(own):
                assert (min(finite), max(finite)) == (min(left), max(left))
        broken = [p for p in own if not all(map(math.isfinite, p))]
        assert [id(p) for p in broken] == [
            id(p) for p in thin[column] if not all(map(math.isfinite, p))
        ]
        if not broken:
            assert len(thin[column]) <= 8


def _by_column(points: list[tuple], last: int) -> dict[int, list[tuple]]:
    columns: dict[int, list[tuple]] = {}
    for point in points:
        columns.setdefault(int(point[0] / last * COLUMNS), []).append(point)
    return columns


def test_a_long_curve_takes_little_of_the_page(make_record) -> None:
    curve = [(n, 5 + math.sin(n) / (1 + n / 1e4)) for n in range(1, 40_001)]
    curve[12_345] = (12_346, 1.25)
    page = page_of(make_record(curve=curve))
    [row] = page.xpath("//tr[@data-points]")
    updates = [int(point.split(",")[0]) for point in row.get("data-points").split()]
    assert len(updates) <= 4 * (COLUMNS + 1) and updates[0] == 1 and updates[-1] == 40_000
    assert 12_346 in updates and "1.2500" in row.text_content()
