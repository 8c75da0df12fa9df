"""Diagnostics against the same numbers computed by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from normexp.norms import available_norms, build_norm
from normexp.norms.running_norm import RunningNorm
from normexp.training.diagnostics import norm_diagnostics, update_diagnostics

CHANNELS = 4


class FakeNorm(nn.Module):
    def __init__(self, **statistics: list[float]) -> None:
        super().__init__()
        self.values = {name: torch.tensor(value) for name, value in statistics.items()}

    def statistics(self) -> dict[str, torch.Tensor]:
        return self.values


def test_second_moments_are_averaged_and_vectors_give_their_length():
    model = nn.ModuleDict(
        {
            "encoder": nn.ModuleDict({"attention": FakeNorm(psi2=[1.0, 3.0], nu=[3.0, -4.0])}),
            "decoder": nn.Sequential(
                nn.LayerNorm(2), FakeNorm(mean=[-1.0, 1.0], var=[0.5, 1.0]), nn.Linear(2, 2)
            ),
        }
    )
    assert norm_diagnostics(model) == {
        "norm/encoder.attention/psi2_mean": 2.0,
        "norm/encoder.attention/nu_norm": 5.0,
        "norm/decoder.1/mean_norm": math.sqrt(2.0),
        "norm/decoder.1/var_mean": 0.75,
    }


def test_a_diverging_statistic_is_passed_on():
    scalars = norm_diagnostics(FakeNorm(nu=[math.nan, 1.0], psi2=[math.inf, 1.0]))
    assert math.isnan(scalars["norm//nu_norm"]) and math.isinf(scalars["norm//psi2_mean"])


def test_batches_that_were_not_finite_are_counted():
    norm = build_norm("power_v", 2)
    for value in (1.0, math.nan, 1.0, math.inf):
        norm(torch.full((3, 2), value))
    assert norm_diagnostics(nn.Sequential(norm))["norm/0/rejected"] == 2


def test_a_model_without_statistics_gives_nothing():
    assert norm_diagnostics(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))) == {}


class Trainer:
    """The part of fairseq's trainer that the diagnostics read; one call per batch of an update."""

    is_data_parallel_master = True

    def __init__(self, model: nn.Module, log_interval: int = 1) -> None:
        self.model, self.updates = model, 0
        self.cfg = SimpleNamespace(common=SimpleNamespace(log_interval=log_interval))
        self.reports: dict[int, dict[str, float]] = {}

    def get_model(self) -> nn.Module:
        return self.model

    def get_num_updates(self) -> int:
        return self.updates

    def update(self, *batches: torch.Tensor, overflow: bool = False) -> dict[str, float]:
        with update_diagnostics(self, self.reports.__setitem__):
            self.model.zero_grad()
            for batch in batches:
                self.model(batch).square().sum().backward()
            self.updates += not overflow
        return self.reports.get(self.updates, {})


def draw(seed: int, scale: float = 1.0) -> torch.Tensor:
    """Draw (N, C) tokens whose mean and spread differ from channel to channel."""
    generator = torch.Generator().manual_seed(seed)
    spread = scale * torch.arange(1.0, CHANNELS + 1)
    return torch.randn(50, CHANNELS, generator=generator) * spread + spread / 2


def psi2(batch: torch.Tensor) -> torch.Tensor:
    return batch.double().square().mean(0)


def relative(batch: torch.Tensor, running: torch.Tensor) -> float:
    return float((batch - running).norm() / running.norm())


ONES = torch.ones(CHANNELS, dtype=torch.float64)


@pytest.mark.parametrize("name", ["power", "power_v"])
def test_distance_of_the_quadratic_mean(name):
    trainer = Trainer(nn.Sequential(build_norm(name, CHANNELS)))
    first, second = draw(1), draw(2, scale=3.0)
    shown = trainer.update(first)["norm/0/psi2_distance"]
    assert shown == pytest.approx(relative(psi2(first), ONES), rel=1e-5)
    shown = trainer.update(second)["norm/0/psi2_distance"]
    running = 0.9 * ONES + 0.1 * psi2(first)
    assert shown == pytest.approx(relative(psi2(second), running), rel=1e-5)


def test_distances_of_mean_and_variance():
    trainer = Trainer(nn.Sequential(build_norm("batch", CHANNELS, momentum=0.2)))
    first, second = draw(1), draw(2, scale=3.0)
    trainer.update(first)
    shown = trainer.update(second)
    mean = 0.2 * first.double().mean(0)
    var = 0.8 * ONES + 0.2 * first.double().var(0)
    assert shown["norm/0/var_distance"] == pytest.approx(relative(second.double().var(0), var))
    deviations = (second.double().mean(0) - mean).norm() / var.sum().sqrt()
    assert shown["norm/0/mean_distance"] == pytest.approx(float(deviations), rel=1e-5)


def test_several_forwards_in_one_update_are_pooled():
    """The last batch has the largest weight: alpha keeps 0.9 of the statistic before it."""
    trainer = Trainer(nn.Sequential(build_norm("power_v", CHANNELS)))
    batches = [draw(seed, scale) for seed, scale in ((1, 1.0), (2, 3.0), (3, 0.5))]
    weights = [0.81, 0.9, 1.0]
    pooled = sum(w * psi2(x) for w, x in zip(weights, batches, strict=True)) / sum(weights)
    shown = trainer.update(*batches)["norm/0/psi2_distance"]
    assert shown == pytest.approx(relative(pooled, ONES), rel=1e-5)


@pytest.mark.parametrize("warmup_steps", [1, 2, 3, 4, 100])
@pytest.mark.parametrize("forwards", [1, 2])
def test_distance_where_warm_up_averages_otherwise(warmup_steps, forwards):
    """One batch repeated: its distance from the running statistic, for any history of the layer."""
    norm = build_norm("power_released", CHANNELS, warmup_steps=warmup_steps, num_groups=CHANNELS)
    trainer, batch = Trainer(nn.Sequential(norm)), draw(1)
    # Every channel is its own group, so x^2 / (x^2 + eps) is averaged.
    scaled = (batch.double().square() / (batch.double().square() + 1e-5)).mean(0)
    norm.running_psi2.fill_(7.0)
    for update in range(1, 5):
        before = norm.running_psi2.double()
        shown = trainer.update(*[batch] * forwards)["norm/0/psi2_distance"]
        assert shown == pytest.approx(relative(scaled, before), rel=1e-3, abs=1e-4), update


@pytest.mark.parametrize("name", available_norms())
def test_every_layer_tells_its_gradient_and_those_with_statistics_their_distance(name):
    norm = build_norm(name, 2 * CHANNELS)
    trainer = Trainer(nn.ModuleDict({"encoder": nn.ModuleDict({"layer_norm": norm})}))
    trainer.get_model().forward = norm.forward
    shape = (5, 5, 2 * CHANNELS)  # tokens, sentences, channels
    batch = draw(1).reshape(shape).requires_grad_()
    shown = trainer.update(batch)
    gradients = [p.grad for p in norm.parameters()]
    if gradients:
        expected = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        assert expected > 0
        assert shown["norm/encoder_final/grad_norm"] == pytest.approx(expected)
    distances = {name for name in shown if name.endswith("_distance")}
    expected = {"psi2"} if hasattr(norm, "running_psi2") else {"mean", "var"}
    if not isinstance(norm, RunningNorm):
        expected = set()
    assert distances == {f"norm/encoder_final/{name}_distance" for name in expected}
    assert all(math.isfinite(value) for value in shown.values())


def test_an_unusable_batch_has_no_distance():
    trainer = Trainer(nn.Sequential(build_norm("power_v", CHANNELS)))
    shown = trainer.update(torch.full((3, CHANNELS), math.inf))
    assert math.isnan(shown["norm/0/psi2_distance"])
    assert shown["norm/0/rejected"] >= 1


def test_only_updates_that_are_logged_are_looked_at():
    trainer = Trainer(nn.Sequential(build_norm("power_v", CHANNELS)), log_interval=2)
    trainer.update(draw(1))
    trainer.update(draw(2), overflow=True)
    assert not trainer.reports
    for seed in range(3, 8):
        trainer.update(draw(seed))
    assert list(trainer.reports) == [2, 4, 6]
    trainer.is_data_parallel_master = False
    trainer.update(draw(8))
    trainer.update(draw(9))
    assert list(trainer.reports) == [2, 4, 6]


def test_half_precision_weights_have_no_gradient_norm():
    norm = build_norm("power_v", CHANNELS).bfloat16()
    shown = Trainer(nn.Sequential(norm)).update(draw(1).bfloat16())
    assert "norm/0/grad_norm" not in shown
    assert shown["norm/0/psi2_distance"] > 0
