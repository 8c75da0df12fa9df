"""Layers with running statistics in the situations that matter, for the tests of their state."""

import warnings
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

from normexp.norms import available_norms, build_norm, norm_options
from support.batches import Batch, C, random_batch

WITH_STATE = [name for name in available_norms() if list(build_norm(name, C).buffers())]
# What a backward pass changes; the backward of the other layers changes nothing.
CHANGED_IN_BACKWARD = {"power": {"nu"}, "power_released": {"e"}, "unified": {"e", "lambda_window"}}


class Case(NamedTuple):
    """A layer, its options, and the step at which it starts, with statistics of some batches."""

    name: str
    options: Mapping[str, object] = MappingProxyType({})
    first_step: int = 0

    def build(self, num_features: int = C, **more: object) -> torch.nn.Module:
        """In float64 and training mode, with random parameters."""
        norm = build_norm(self.name, num_features, **self.options, **more).double()
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in norm.parameters():
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
        if self.first_step:
            train(norm, range(90, 94))
            norm.zero_grad(set_to_none=True)
            norm.step.fill_(self.first_step)
        return norm


def _cases() -> dict[str, Case]:
    cases = {}
    for name in WITH_STATE:
        if "warmup_steps" in norm_options(name):
            cases[f"{name}-warming-up"] = Case(name, {"warmup_steps": 1000})
            cases[name] = Case(name, {"warmup_steps": 2})
        else:
            cases[name] = Case(name)
    cases["power-bound_nu"] = Case("power", {"warmup_steps": 2, "bound_nu": True})
    filtration = {"warmup_steps": 2, "outlier_filtration": True}
    cases["unified-filtration"] = Case("unified", filtration)
    # Up to step 1000 the layer leaves out one of its factors.
    cases["unified-late"] = Case("unified", {"warmup_steps": 2}, first_step=2000)
    return cases


CASES = _cases()


def batch(seed: int, t: int = 4, b: int = 3, c: int = C) -> Batch:
    """Batches of successive seeds differ in magnitude, so that each moves the statistics."""
    return random_batch(t, b, seed, scale=1.7 ** (seed % 3 - 1), c=c)


def forward(norm: torch.nn.Module, of: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """A leaf x (T, B, C) and the loss sum(gy * y), with penalty, of one forward."""
    x = torch.from_numpy(of.x.copy()).requires_grad_()
    y = norm(x, torch.from_numpy(of.pad))
    return x, penalized(norm, (y * torch.from_numpy(of.gy)).sum())


def penalized(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    """The loss with what the layers of the model want added to it."""
    return loss + sum(m.penalty() for m in model.modules() if hasattr(m, "penalty"))


def train(norm: torch.nn.Module, seeds: Iterable[int]) -> list[torch.Tensor]:
    """A forward and a backward per seed; the gradients at x."""
    gradients = []
    for seed in seeds:
        x, loss = forward(norm, batch(seed, c=norm.num_features))
        loss.backward()
        gradients.append(x.grad)
    return gradients


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all buffers, with what a layer has under way over the ranks."""
    owners = dict(module.named_modules())
    copies = {}
    for path in dict(module.named_buffers()):
        owner, _, name = path.rpartition(".")
        settled = getattr(owners[owner], "settled", owners[owner].get_buffer)
        copies[path] = settled(name).clone()
    return copies


def assert_same(obtained: object, expected: object, tolerance: float = 0.0) -> None:
    """Nested lists and dicts of tensors: equal, or as near as the tolerance relative to size."""
    if tolerance == 0:
        torch.testing.assert_close(obtained, expected, rtol=0, atol=0, equal_nan=True)
    else:
        torch.testing.assert_close(obtained, expected, rtol=tolerance, atol=tolerance)


class no_warnings(warnings.catch_warnings):
    """Context in which a warning is an error."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("error")
