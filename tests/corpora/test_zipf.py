import math
from random import Random

import pytest

from normexp.corpora.toy.zipf import Zipf


def test_frequencies_follow_the_stated_law():
    zipf = Zipf("abcd", offset=2)
    weights = {"a": 1 / 3, "b": 1 / 4, "c": 1 / 5, "d": 1 / 6}
    rng = Random(0)
    draws = [zipf.draw(rng) for _ in range(40_000)]
    for item, weight in weights.items():
        expected = weight / sum(weights.values())
        # five standard deviations of a binomial share
        tolerance = 5 * math.sqrt(expected * (1 - expected) / len(draws))
        assert draws.count(item) / len(draws) == pytest.approx(expected, abs=tolerance)


def test_probabilities_belong_to_the_items_drawn():
    zipf = Zipf("abc")
    assert zipf.probabilities == pytest.approx((6 / 11, 3 / 11, 2 / 11))
    assert [zipf.items[index] for index in range(3)] == ["a", "b", "c"]


@pytest.mark.parametrize(("point", "item"), [(0.0, "a"), (6.1 / 11, "b"), (1 - 2**-53, "c")])
def test_one_random_number_chooses_one_item(point, item):
    class Fixed(Random):
        def random(self):
            return point

    assert Zipf("abc").draw(Fixed()) == item


def test_nothing_to_draw_from_is_an_error():
    with pytest.raises(ValueError, match="at least one item"):
        Zipf([])
