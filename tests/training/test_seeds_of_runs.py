"""What runs of different seeds draw: batches, their order, masks of dropout, weights."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from fairseq.data import data_utils
from fairseq.tasks.translation import TranslationTask
from support.small_runs import composed

from normexp import pipeline
from normexp.config.seeding import Seeds
from normexp.fairseq_plugin.dropout import fast_dropout

EPOCHS = 3


class Drawn(NamedTuple):
    """Of one run: the sentences of each batch, a mask of each update, the first weights."""

    batches: list[tuple[int, ...]]
    masks: list[tuple[float, ...]]
    weights: torch.Tensor

    @property
    def epochs(self) -> list[list[tuple[int, ...]]]:
        length = len(self.batches) // EPOCHS
        return [self.batches[first : first + length] for first in range(0, EPOCHS * length, length)]


@pytest.fixture
def drawn(overrides, little_text: Path, tmp_path: Path, monkeypatch) -> Callable[..., Drawn]:
    """Return drawn(override, ...) -> what a training draws."""
    runs = 0

    def train(*more: str) -> Drawn:
        nonlocal runs
        runs += 1
        seen = Drawn([], [], torch.empty(0))
        weights = []
        original = TranslationTask.train_step

        def train_step(task, sample, model, *args, **kwargs):
            with torch.random.fork_rng(devices=[]):
                seen.masks.append(tuple(fast_dropout(torch.ones(64), 0.5).tolist()))
            seen.batches.append(tuple(sample["id"].tolist()))
            weights.append(model.encoder.embed_tokens.weight.detach().clone())
            return original(task, sample, model, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(TranslationTask, "train_step", train_step)
            settings = overrides(
                "toy_translation",
                f"data.dir={little_text}",
                f"results_dir={tmp_path / str(runs)}",
                "fairseq.dataset.max_tokens=400",
                f"fairseq.optimization.max_epoch={EPOCHS}",
                "evaluation.splits=[valid]",
                *more,
            )
            assert pipeline.run(composed(*settings)).status == "complete"
        return seen._replace(weights=weights[0])

    return train


def test_seeds_share_nothing(drawn) -> None:
    first, second = drawn("seed=1"), drawn("seed=2")
    assert len(first.masks) > 20
    assert not set(first.masks) & set(second.masks)
    orders = [tuple(epoch) for run in (first, second) for epoch in run.epochs]
    assert len(set(orders)) == 2 * EPOCHS
    assert not torch.equal(first.weights, second.weights)


def test_seeds_of_fairseq_repeat_each_other_at_an_offset(drawn) -> None:
    """What is mended; the committed records were made in this way."""
    first, second = (drawn(f"seed={seed}", "seeding=fairseq") for seed in (1, 2))
    assert first.masks[1:] == second.masks[:-1]
    assert first.epochs[1:] == second.epochs[:-1]


def test_batches_are_drawn_with_the_seed_of_their_epoch(drawn, monkeypatch) -> None:
    seeds = []
    numpy_seed = data_utils.numpy_seed

    def noted(seed: int, *more: int) -> AbstractContextManager[None]:
        seeds.append(seed)
        return numpy_seed(seed, *more)

    monkeypatch.setattr(data_utils, "numpy_seed", noted)
    drawn("seed=5")
    own = Seeds(5, "separated")
    in_order = {own.initialization + 1, 1 + 1}  # validation while training, evaluation: unshuffled
    expected = {own.order(epoch) for epoch in range(1, EPOCHS + 2)}  # one is made, but not used
    assert set(seeds) - in_order <= expected
    assert {own.order(epoch) for epoch in range(1, EPOCHS + 1)} <= set(seeds)


def test_norms_of_one_seed_are_pairs(drawn) -> None:
    layer, power = drawn("norm=layer"), drawn("norm=power")
    assert layer.batches == power.batches and layer.masks == power.masks
    assert torch.equal(layer.weights, power.weights)
