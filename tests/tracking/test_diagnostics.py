"""Diagnostics against the same numbers computed by hand."""

import math

import torch
from torch import nn

from normexp.diagnostics import norm_diagnostics
from normexp.norms import build_norm


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
