"""Seeds derived for a purpose: none is that of another purpose, seed, update, epoch or rank."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.small_runs import composed

from normexp.config.fairseq_config import typed_config
from normexp.config.identity import config_hash
from normexp.config.seeding import BITS, INDEX_BITS, PURPOSES, SEED_BITS, Seeds, derived_seed

SEEDS = range(1, 51)


def separated(seed: int) -> Seeds:
    return Seeds(seed, "separated")


def test_no_two_updates_of_fifty_seeds_share_a_generator() -> None:
    masks = {separated(seed).masks(update) for seed in SEEDS for update in range(5000)}
    assert len(masks) == 50 * 5000
    orders = {separated(seed).order(epoch) for seed in SEEDS for epoch in range(1, 201)}
    assert len(orders) == 50 * 200
    weights = {separated(seed).initialization for seed in SEEDS}
    assert len(weights) == 50
    assert not (masks & orders or masks & weights or orders & weights)
    assert all(0 <= seed < 2**BITS for seed in masks | orders | weights)


def test_fairseq_repeats_itself_an_update_and_an_epoch_later() -> None:
    first, second = Seeds(1, "fairseq"), Seeds(2, "fairseq")
    assert all(first.masks(update + 1) == second.masks(update) for update in range(5000))
    assert all(first.order(epoch + 1) == second.order(epoch) for epoch in range(1, 200))
    assert second.initialization == first.masks(1)


small = st.tuples(
    st.integers(1, 2**SEED_BITS - 1), st.sampled_from(PURPOSES), st.integers(0, 2**INDEX_BITS - 1)
)


@given(small, small, st.integers(0, 1000))
def test_equal_seeds_are_of_equal_things(one: tuple, other: tuple, rank: int) -> None:
    assert (derived_seed(*one, rank) == derived_seed(*other, rank)) == (one == other)


@given(st.integers(1, 2**31 - 1), st.integers(0, 2**31), st.integers(0, 10_000))
def test_any_seed_and_index_give_a_seed_that_generators_take(seed, index, rank) -> None:
    assert 0 <= derived_seed(seed, "masks", index, rank) < 2**31


def test_ranks_and_large_seeds_have_others() -> None:
    """Neither the same as another's, nor the same at a distance."""
    rows = [
        [derived_seed(seed, "masks", update, rank) for update in range(3000)]
        for seed, rank in [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (513, 0), (2**31 - 1, 0)]
    ]
    assert len({seed for row in rows for seed in row}) >= 7 * 3000 - 2  # by chance


def test_one_bit_of_the_seed_changes_half_of_the_bits() -> None:
    flipped = [
        (derived_seed(seed, "masks", update) ^ derived_seed(seed ^ 1, "masks", update)).bit_count()
        for seed in range(2, 40)
        for update in range(50)
    ]
    assert abs(sum(flipped) / len(flipped) / BITS - 0.5) < 0.02


@pytest.mark.parametrize("norm", ["layer", "batch", "power"])
def test_seeds_do_not_depend_on_the_norm(norm: str) -> None:
    settings = composed(f"norm={norm}", "seed=3")
    assert settings.seeds == separated(3)
    assert typed_config(settings).common.seed == separated(3).initialization


def test_earlier_runs_keep_their_seeds_and_their_hash() -> None:
    settings = composed("seed=3", "seeding=fairseq")
    assert typed_config(settings).common.seed == 3
    earlier = settings.model_dump(mode="json")
    del earlier["seeding"]
    assert config_hash(type(settings).model_validate(earlier)) == config_hash(settings)
    assert config_hash(composed("seed=3")) != config_hash(settings)
