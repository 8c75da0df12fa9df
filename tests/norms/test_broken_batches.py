"""Batches with NaN or overflow in them: reported, and without a trace in the running state."""

import copy
import warnings

import numpy as np
import pytest
import torch
from support.batches import Batch, C, quick_options, random_batch
from support.norm_steps import penalty_of

from normexp.norms import available_norms, build_norm

WITH_STATE = [name for name in available_norms() if list(build_norm(name, C).buffers())]
WITHOUT_STATE = sorted(set(available_norms()) - set(WITH_STATE))
# Layers whose backward changes the state, and what of it.
CHANGED_IN_BACKWARD = {"power": {"nu"}, "power_released": {"e"}, "unified": {"e", "lambda_window"}}
BROKEN = [np.nan, np.inf, -np.inf]


def train(norm: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """One forward and backward: y and the gradient at x."""
    x = torch.from_numpy(batch.x).requires_grad_()
    norm.train()
    y = norm(x, torch.from_numpy(batch.pad))
    loss = (y * torch.from_numpy(batch.gy)).sum() + penalty_of(norm)
    loss.backward()
    return y.detach(), x.grad


def spoil(values: np.ndarray, batch: Batch, with_value: float) -> np.ndarray:
    """A copy with one entry of a real token replaced."""
    spoilt = values.copy()
    t, b = np.argwhere(batch.token_mask)[0]
    spoilt[t, b, 1] = with_value
    return spoilt


def state(norm: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: buffer.clone() for n, buffer in norm.named_buffers() if n != "num_rejected"}


def trained(name: str, steps: int) -> torch.nn.Module:
    norm = build_norm(name, C, **quick_options(name)).double()
    for seed in range(steps):
        train(norm, random_batch(4, 3, seed))
    return norm


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("steps", [0, 1, 6], ids=["first-step", "warm-up", "after-warm-up"])
@pytest.mark.parametrize("name", WITH_STATE)
def test_broken_forward_is_counted_and_left_out(name: str, steps: int, value: float) -> None:
    norm = trained(name, steps)
    twin = copy.deepcopy(norm)
    batch = random_batch(4, 3, 50)
    y, _ = train(norm, Batch(spoil(batch.x, batch, value), batch.pad, batch.gy))
    assert not y[torch.from_numpy(batch.token_mask)].isfinite().all(), "the loss must show it"
    assert norm.num_rejected >= 1
    for what, expected in state(twin).items():
        assert torch.equal(state(norm)[what], expected), what
    for seed in range(60, 64):
        obtained, expected = (train(layer, random_batch(4, 3, seed)) for layer in (norm, twin))
        torch.testing.assert_close(obtained, expected, rtol=0, atol=0)
    for what, expected in state(twin).items():
        assert torch.equal(state(norm)[what], expected), what
    assert twin.num_rejected == 0


@pytest.mark.parametrize("steps", [1, 6], ids=["warm-up", "after-warm-up"])
@pytest.mark.parametrize("name", sorted({*WITH_STATE} - {"batch_released", "power_released"}))
def test_overflow_is_counted_and_left_out(name: str, steps: int) -> None:
    """A finite batch whose squares are not: its forward changes nothing, the state stays finite.

    Its backward may be finite and then counts. (Layers that scale every token first are immune.)
    """
    norm = trained(name, steps)
    before = state(norm)
    batch = random_batch(4, 3, 50)
    train(norm, Batch(spoil(batch.x, batch, 1e200), batch.pad, batch.gy))
    assert norm.num_rejected >= 1
    for what, obtained in state(norm).items():
        assert obtained.isfinite().all(), what
        if what not in CHANGED_IN_BACKWARD.get(name, ()):
            assert torch.equal(obtained, before[what]), what
    y, gx = train(norm, random_batch(4, 3, 51))
    assert y.isfinite().all() and gx.isfinite().all()


@pytest.mark.parametrize("name", sorted({*WITH_STATE} - {"batch_released", "power_released"}))
def test_statistics_beyond_the_state_are_left_out(name: str) -> None:
    """A float64 batch in a float32 layer: its squares are finite, but not in float32."""
    norm = build_norm(name, C, **quick_options(name))
    batch = random_batch(4, 3, 50, scale=1e25)
    train(norm, batch)
    assert norm.num_rejected >= 1
    for what, buffer in norm.named_buffers():
        assert buffer.isfinite().all(), what


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("steps", [1, 6], ids=["warm-up", "after-warm-up"])
@pytest.mark.parametrize("name", WITH_STATE)
def test_broken_backward_is_counted_and_left_out(name: str, steps: int, value: float) -> None:
    """A gradient that is not finite: what the forward averaged stays, the backward's part does not.

    A layer without state in backward has nothing to lose and nothing to count.
    """
    norm = trained(name, steps)
    healthy = copy.deepcopy(norm)
    batch = random_batch(4, 3, 50)
    train(healthy, batch)
    before = state(norm)
    _, gx = train(norm, Batch(batch.x, batch.pad, spoil(batch.gy, batch, value)))
    assert not gx[torch.from_numpy(batch.token_mask)].isfinite().all()
    assert norm.num_rejected == (1 if name in CHANGED_IN_BACKWARD else 0)
    for what, obtained in state(norm).items():
        unchanged = what in CHANGED_IN_BACKWARD.get(name, ())
        expected = before[what] if unchanged else state(healthy)[what]
        assert torch.equal(obtained, expected), what
    _, gx = train(norm, random_batch(4, 3, 51))
    assert gx.isfinite().all()


@pytest.mark.parametrize("name", WITH_STATE)
def test_eval_tells_once_of_rejected_batches(name: str) -> None:
    norm = trained(name, 3)
    model = torch.nn.Sequential(torch.nn.Linear(C, C), norm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()
        model.train()
    batch = random_batch(4, 3, 50)
    broken = Batch(spoil(batch.x, batch, np.nan), batch.pad, batch.gy)
    passes = 2 if name in CHANGED_IN_BACKWARD else 1
    train(norm, broken)
    train(norm, broken)
    assert norm.num_rejected == 2 * passes
    with pytest.warns(UserWarning, match=rf"{type(norm).__name__}.*{2 * passes} passes.*finite"):
        model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()
        model.train()
        train(norm, batch)
        model.eval()
    train(norm, broken)
    with pytest.warns(UserWarning, match=f" {passes} passes"):
        model.eval()


@pytest.mark.parametrize("name", WITH_STATE)
def test_eval_mode_counts_nothing(name: str) -> None:
    norm = trained(name, 3).eval()
    before = state(norm)
    batch = random_batch(4, 3, 50)
    norm(torch.from_numpy(spoil(batch.x, batch, np.nan)), torch.from_numpy(batch.pad))
    assert norm.num_rejected == 0
    for what, expected in before.items():
        assert torch.equal(state(norm)[what], expected), what


@pytest.mark.parametrize("name", WITHOUT_STATE)
def test_broken_token_stays_alone_without_state(name: str) -> None:
    """It reaches its own token, or its sentence where positions are mixed; nobody else."""
    norm = build_norm(name, C, **quick_options(name)).double()
    batch = random_batch(4, 3, 50)
    y, gx = train(norm, Batch(spoil(batch.x, batch, np.nan), batch.pad, batch.gy))
    t, b = np.argwhere(batch.token_mask)[0]
    untouched = np.ones((4, 3), dtype=bool)
    untouched[slice(None) if getattr(norm, "mixes_positions", False) else t, b] = False
    expected_y, expected_gx = train(copy.deepcopy(norm), batch)
    assert torch.equal(y[untouched], expected_y[untouched])
    assert torch.equal(gx[untouched], expected_gx[untouched])
    assert y[t, b].isnan().any()
