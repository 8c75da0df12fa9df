"""What padding may change, for every registered normalization, and that it changes nothing else.

Padding differs between two runs in one respect at a time: what stands there, how much of it there
is, or the gradient that arrives there. Each run is three training steps and an inference.
"""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.batches import Batch, C, few_examples, quick_options, random_batch
from support.norm_steps import LayerSteps

from normexp.norms import available_norms, build_norm
from normexp.norms.reference import REFERENCES, Reference
from normexp.norms.reference.base import TokenReference

# Treat every position by itself, so that they need no mask; their parameters' gradients are sums
# over all positions that get a gradient.
PER_TOKEN = {
    name: {parameter for parameter, _ in build_norm(name, C).named_parameters()}
    for name in available_norms()
    if issubclass(REFERENCES.get(name, Reference), TokenReference)
}
# What padding changes because the original code lets it: `values` at padded positions without a
# gradient there, the `number` of padded positions, a `gradient` there, and values where there
# also is a gradient. y, gx: at real tokens; weight, bias: their gradients; y_eval: inference.
RELEASED = {
    "batch_released": {
        "number": {"y", "gx", "weight", "running_var", "y_eval"},
        "gradient": {"bias"},
    },
    "power_released": {
        "values": {"e", "gx"},
        "number": {"e", "gx"},
        "gradient": {"e", "gx", "weight", "bias"},
        "values under a gradient": {"e", "gx", "weight"},
    },
    "unified": {
        "number": {"e", "lambda_window", "gx"},
        "gradient": {"e", "lambda_window", "gx", "weight", "bias"},
        "values under a gradient": {"e", "lambda_window", "gx", "weight"},
    },
}
DIFFERENCES = ["values", "number", "gradient", "values under a gradient"]


def leaks(name: str, difference: str) -> set[str]:
    """What may differ between two runs whose padding differs so; nothing for most layers."""
    if name in PER_TOKEN and difference == "gradient":
        return PER_TOKEN[name]
    if name in PER_TOKEN and difference == "values under a gradient":
        return PER_TOKEN[name] - {"bias"}
    return RELEASED.get(name, {}).get(difference, set())


def run(name: str, batches: list[Batch]) -> dict[str, list[np.ndarray]]:
    """Everything that three steps and an inference give at real tokens, and the state."""
    layer = LayerSteps(name, C, **quick_options(name))
    rng = np.random.default_rng(5)
    for parameter in layer.parameters.values():
        parameter[...] = rng.uniform(0.5, 1.5, parameter.shape)
    results: dict[str, list[np.ndarray]] = {}
    for batch in batches[:-1]:
        step = layer.train_step(batch.x, batch.pad, batch.gy)
        named = {
            "y": step.y[batch.token_mask],
            "gx": step.gx[batch.token_mask],
            "penalty": step.penalty,
        }
        for what, value in (named | step.gradients | layer.state()).items():
            results.setdefault(what, []).append(np.asarray(value))
    last = batches[-1]
    results["y_eval"] = [layer.infer(last.x, last.pad)[last.token_mask]]
    return results


def with_padding(batch: Batch, seed: int, difference: str, extra: int) -> tuple[Batch, Batch]:
    """Two batches of the same real tokens that differ in their padding as named."""
    rng = np.random.default_rng(seed)
    _, b, c = batch.x.shape
    pad = np.concatenate([batch.pad, np.ones((b, extra), dtype=bool)], axis=1)
    padded = pad.T[..., None]

    def filled(values: np.ndarray, scale: float) -> np.ndarray:
        longer = np.concatenate([values, np.zeros((extra, b, c))])
        return np.where(padded, scale * rng.standard_normal(longer.shape), longer)

    quiet = Batch(filled(batch.x, 1.0), pad, filled(batch.gy, 0.0))
    if difference == "number":
        return Batch(
            batch.x, batch.pad, np.where(batch.token_mask[..., None], batch.gy, 0.0)
        ), quiet
    loud = Batch(filled(batch.x, 30.0), pad, filled(batch.gy, 1.0))
    return {
        "values": (quiet, Batch(loud.x, pad, quiet.gy)),
        "gradient": (quiet, Batch(quiet.x, pad, loud.gy)),
        "values under a gradient": (Batch(quiet.x, pad, loud.gy), loud),
    }[difference]


def what_differs(name: str, batches: list[Batch], difference: str, extra: int) -> set[str]:
    pairs = [with_padding(batch, i, difference, extra) for i, batch in enumerate(batches)]
    ones, others = (run(name, list(side)) for side in zip(*pairs, strict=True))
    assert ones.keys() == others.keys()
    return {
        what
        for what in ones
        if not all(
            np.allclose(one, other, rtol=1e-9, atol=1e-11)
            for one, other in zip(ones[what], others[what], strict=True)
        )
    }


@pytest.mark.parametrize("difference", DIFFERENCES)
@pytest.mark.parametrize("name", available_norms())
@settings(few_examples, max_examples=6)
@given(
    t=st.integers(1, 5), b=st.integers(1, 3), seed=st.integers(0, 10**6), extra=st.integers(1, 3)
)
def test_padding_changes_nothing_but_the_known(
    name: str, difference: str, t: int, b: int, seed: int, extra: int
) -> None:
    batches = [random_batch(t, b, seed + i) for i in range(4)]
    changed = what_differs(name, batches, difference, extra)
    assert changed <= leaks(name, difference)


@pytest.mark.parametrize("difference", DIFFERENCES)
@pytest.mark.parametrize("name", available_norms())
def test_known_leaks_exist(name: str, difference: str) -> None:
    """The list above claims no leak that is not there."""
    batches = [random_batch(5, 3, seed) for seed in range(4)]
    assert what_differs(name, batches, difference, extra=2) == leaks(name, difference)


@pytest.mark.parametrize("name", sorted(set(available_norms()) - set(PER_TOKEN) - set(RELEASED)))
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e300])
def test_anything_may_stand_at_padding(name: str, garbage: float) -> None:
    """Not even NaN gets out of padding, where a layer takes nothing from there."""
    batches = [random_batch(5, 3, seed) for seed in range(4)]
    for batch in batches:
        batch.gy[~batch.token_mask] = 0.0
    spoilt = [
        Batch(np.where(batch.token_mask[..., None], batch.x, garbage), batch.pad, batch.gy)
        for batch in batches
    ]
    clean, dirty = run(name, batches), run(name, spoilt)
    for what, values in clean.items():
        for value, other in zip(values, dirty[what], strict=True):
            np.testing.assert_allclose(other, value, rtol=1e-12, atol=1e-12, err_msg=what)
    assert "num_rejected" not in clean or clean["num_rejected"][-1] == 0


@pytest.mark.parametrize("name", available_norms())
def test_batch_without_a_real_token_changes_no_state(name: str) -> None:
    """Not even the step counter, forward and backward; outputs and gradients stay finite."""
    layer = LayerSteps(name, C, **quick_options(name))
    for seed in range(4):
        batch = random_batch(4, 3, seed)
        before = layer.state()
        nothing_real = np.ones_like(batch.pad)
        step = layer.train_step(batch.x, nothing_real, batch.gy)
        assert np.isfinite(step.y).all() and np.isfinite(step.gx).all()
        assert step.penalty == 0
        for what, value in layer.state().items():
            np.testing.assert_array_equal(value, before[what], err_msg=what)
        layer.train_step(batch.x, batch.pad, batch.gy)
    assert np.isfinite(layer.infer(batch.x, nothing_real)).all()


@pytest.mark.parametrize("steps", [1, 6])  # in the warm-up and past it
@pytest.mark.parametrize("name", available_norms())
def test_batch_of_padding_only_takes_no_part(name: str, steps: int) -> None:
    """Where no gradient arrives, none leaves. What the original code treats as tokens is
    normalized as in inference, forward and backward.
    """
    norm = build_norm(name, C, **quick_options(name)).double()
    batches = [random_batch(4, 3, seed) for seed in range(steps + 1)]
    for batch in batches[:steps]:
        y = norm(torch.from_numpy(batch.x), torch.from_numpy(batch.pad))
        loss = (y * torch.from_numpy(batch.gy)).sum()
        if y.requires_grad:
            loss.backward()
        if hasattr(norm, "penalty"):
            norm.penalty()
    twin = copy.deepcopy(norm).eval()
    norm.zero_grad(), twin.zero_grad()
    nothing_real = torch.ones(3, 4, dtype=torch.bool)
    for gradient in (torch.zeros(4, 3, C).double(), torch.from_numpy(batches[-1].gy)):
        x, other = (torch.from_numpy(batches[-1].x).requires_grad_() for _ in range(2))
        y = norm(x, nothing_real)
        y.backward(gradient)
        if hasattr(norm, "penalty"):
            norm.penalty()
        expected = twin(other, nothing_real)
        expected.backward(gradient)
        if not gradient.any():
            for value in (x, *norm.parameters()):
                assert not value.grad.any()
        if name in ("power_released", "unified"):
            torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
            for value, of_twin in zip(
                (x, *norm.parameters()), (other, *twin.parameters()), strict=True
            ):
                torch.testing.assert_close(value.grad, of_twin.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["batch", "regularized_batch", "power_v", "power"])
def test_padding_is_zero_in_output_and_gradient(name: str) -> None:
    """In training; and what is handed to backward is left as it is."""
    generator = torch.Generator().manual_seed(3)
    norm = build_norm(name, 6)
    x = torch.randn(5, 4, 6, generator=generator).requires_grad_()
    gradient = torch.randn(5, 4, 6, generator=generator)
    kept = gradient.clone()
    padding_mask = torch.arange(5) >= torch.tensor([5, 2, 4, 0])[:, None]
    padded = padding_mask.t()
    for _ in range(2):
        y = norm(x, padding_mask)
        (gx,) = torch.autograd.grad(y, x, gradient)
        assert torch.equal(y[padded], torch.zeros(9, 6))
        assert torch.equal(gx[padded], torch.zeros(9, 6))
        assert (gx[~padded] != 0).all() and (y[~padded] != 0).all()
        assert torch.equal(gradient, kept)
        if name == "regularized_batch":
            norm.penalty()
