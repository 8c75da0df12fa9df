"""What must not matter to any registered normalization: order, layout, training or inference."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.batches import C, few_examples, quick_options, random_batch
from support.norm_steps import LayerSteps, penalty_of

from normexp.norms import available_norms, build_norm, norm_options

# Whose running variance is the unbiased estimate, and over which positions.
UNBIASED_OVER = {"batch": "real tokens", "batch_released": "all positions"}


def assert_close(obtained: np.ndarray, expected: np.ndarray, what: str) -> None:
    size = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(obtained, expected, rtol=1e-9, atol=1e-11 * size, err_msg=what)


@pytest.mark.parametrize("name", available_norms())
@few_examples
@given(t=st.integers(1, 5), b=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_order_of_sentences_does_not_matter(name: str, t: int, b: int, seed: int) -> None:
    """Outputs and gx permute with them; parameters' gradients and state are the same."""
    plain, permuted = (LayerSteps(name, C, **quick_options(name)) for _ in range(2))
    rng = np.random.default_rng(seed)
    for step in range(4):
        batch = random_batch(t, b, seed + step)
        order = rng.permutation(b)
        expected = plain.train_step(batch.x, batch.pad, batch.gy)
        obtained = permuted.train_step(batch.x[:, order], batch.pad[order], batch.gy[:, order])
        assert_close(obtained.y, expected.y[:, order], "y")
        assert_close(obtained.gx, expected.gx[:, order], "gx")
        assert_close(obtained.penalty, expected.penalty, "penalty")
        for what, value in (expected.gradients | plain.state()).items():
            assert_close((obtained.gradients | permuted.state())[what], value, what)
    x, pad = batch.x, batch.pad
    assert_close(permuted.infer(x[:, order], pad[order]), plain.infer(x, pad)[:, order], "y_eval")


@pytest.mark.parametrize("name", available_norms())
@few_examples
@given(t=st.integers(1, 4), b=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_tokens_may_come_as_a_list(name: str, t: int, b: int, seed: int) -> None:
    """(N, C) with a mask (N,) gives what (T, B, C) with (B, T) gives.

    A list counts as one sentence, which only a layer that mixes a sentence's positions can tell.
    """
    if getattr(build_norm(name, C), "mixes_positions", False):
        b = 1
    as_batch = build_norm(name, C, **quick_options(name)).double()
    as_list = build_norm(name, C, **quick_options(name)).double()
    for step in range(4):
        batch = random_batch(t, b, seed + step)
        shapes = ((as_batch, (t, b, C), batch.pad), (as_list, (t * b, C), batch.pad.T.reshape(-1)))
        results = []
        for norm, shape, pad in shapes:
            x = torch.from_numpy(batch.x.reshape(shape)).requires_grad_()
            y = norm(x, torch.from_numpy(pad))
            assert y.shape == shape
            (y * torch.from_numpy(batch.gy.reshape(shape))).sum().add(penalty_of(norm)).backward()
            results.append([y.detach().reshape(t, b, C), x.grad.reshape(t, b, C)])
        results[0] += as_batch.state_dict().values()
        results[1] += as_list.state_dict().values()
        for of_batch, of_list in zip(*results, strict=True):
            torch.testing.assert_close(of_list, of_batch, rtol=1e-10, atol=1e-10)
    expected = as_batch.eval()(torch.from_numpy(batch.x), torch.from_numpy(batch.pad))
    obtained = as_list.eval()(x, torch.from_numpy(pad))
    torch.testing.assert_close(obtained.reshape(t, b, C), expected, rtol=1e-10, atol=1e-10)


def _transposed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _channels_first(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def _every_second(x: torch.Tensor) -> torch.Tensor:
    spaced = torch.full([2 * size for size in x.shape], torch.nan, dtype=x.dtype)
    window = spaced[tuple(slice(None, None, 2) for _ in x.shape)]
    return window.copy_(x)


def _middle(x: torch.Tensor) -> torch.Tensor:
    padded = torch.full([size + 2 for size in x.shape], torch.nan, dtype=x.dtype)
    return padded[tuple(slice(1, -1) for _ in x.shape)].copy_(x)


@pytest.mark.parametrize("layout", [_transposed, _channels_first, _every_second, _middle])
@pytest.mark.parametrize("name", available_norms())
def test_memory_layout_does_not_matter(
    name: str, layout: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """x, its gradient and the mask with other strides, also as a list of tokens."""
    for as_list in (False, True):
        norms = [build_norm(name, C, **quick_options(name)).double() for _ in range(2)]
        for seed in range(4):
            batch = random_batch(4, 3, seed)
            x, gy = torch.from_numpy(batch.x), torch.from_numpy(batch.gy)
            mask = torch.from_numpy(batch.pad)
            if as_list:
                x, gy, mask = x.flatten(0, 1), gy.flatten(0, 1), mask.t().reshape(-1)
            strided_mask = mask.t().contiguous().t() if mask.dim() == 2 else mask.repeat(2)[:12]
            results = []
            for norm, values, gradient, padding in (
                (norms[0], x.contiguous(), gy.contiguous(), mask),
                (norms[1], layout(x), layout(gy), strided_mask),
            ):
                leaf = values.detach().requires_grad_()
                assert leaf.stride() == values.stride()
                norm.zero_grad()
                y = norm(leaf, padding)
                penalty_of(norm)
                y.backward(gradient)
                gradients = [parameter.grad for parameter in norm.parameters()]
                results.append([y, leaf.grad, *gradients, *norm.buffers()])
            for expected, obtained in zip(*results, strict=True):
                torch.testing.assert_close(obtained, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", available_norms())
def test_expanded_input_and_gradient(name: str) -> None:
    """Stride 0: one sentence shown to the layer as three, and the gradient of y.sum()."""
    expanded, copied = (build_norm(name, C, **quick_options(name)).double() for _ in range(2))
    for seed in range(4):
        x = torch.from_numpy(random_batch(4, 1, seed).x)
        results = []
        for norm, values in ((expanded, x.expand(4, 3, C)), (copied, x.repeat(1, 3, 1))):
            leaf = values.detach().requires_grad_()
            y = norm(leaf)
            (y.sum() + penalty_of(norm)).backward()
            results.append([y, leaf.grad, *norm.buffers()])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", available_norms())
@settings(few_examples, max_examples=5)
@given(t=st.integers(1, 4), b=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_inference_is_training_on_average(name: str, t: int, b: int, seed: int) -> None:
    """After many identical batches inference gives what training gave.

    A normalization without state does so at once and bit by bit; one with an unbiased running
    variance differs by the factor sqrt((N - 1) / N).
    """
    batch = random_batch(t, b, seed)
    x, pad = torch.from_numpy(batch.x), torch.from_numpy(batch.pad)
    tiny = {"eps": 1e-12} if "eps" in norm_options(name) else {}  # for the factor to be exact
    norm = build_norm(name, C, **quick_options(name), **tiny).double()
    token_mask = batch.token_mask
    if not list(norm.buffers()):
        assert torch.equal(norm(x, pad), norm.eval()(x, pad))
        return
    positions = {"real tokens": token_mask.sum(), "all positions": token_mask.size}
    n = positions.get(UNBIASED_OVER.get(name), np.inf)
    if n < 3:  # no variance, or one that is nothing but rounding
        return
    with torch.no_grad():
        for _ in range(700):
            y = norm(x, pad)
            penalty_of(norm)
        y_eval = norm.eval()(x, pad)
    factor = 1.0 if np.isinf(n) else np.sqrt((n - 1) / n)
    np.testing.assert_allclose(y_eval[token_mask], factor * y[token_mask], rtol=1e-6, atol=1e-6)
