"""The sublayers for training against fairseq's attention, torch's layers and the plain dropout."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from fairseq.modules import MultiheadAttention
from torch import Tensor, nn

from normexp.fairseq_plugin import sublayers
from normexp.fairseq_plugin.dropout import Draws, FastDropout, fast_dropout
from normexp.fairseq_plugin.fast_attention import FastAttention
from normexp.fairseq_plugin.row_counts import rounded_up
from normexp.fairseq_plugin.sublayers import Heads, Rows
from normexp.norms.kernels.choice import chosen_kernels, use_kernels

T, S, B, C, HEADS = 67, 59, 3, 24, 3  # more queries than attention takes at a time
OUTER = 0.3

pytestmark = pytest.mark.skipif(not sublayers.compiled(), reason="no compiler")


@pytest.fixture(autouse=True)
def _compiled_kernels() -> Iterator[None]:
    """Choose them: a run of another test may have chosen plain ones for the process."""
    chosen = chosen_kernels()
    use_kernels("auto")
    yield
    use_kernels(chosen)


def _attention(p: float) -> MultiheadAttention:
    torch.manual_seed(1)
    module = MultiheadAttention(C, HEADS, dropout=p, self_attention=True).double().train()
    module.__class__, module.dropout_module.__class__ = FastAttention, FastDropout
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def _pairs(*layers: nn.Linear) -> tuple[Tensor, ...]:
    return tuple(parameter for layer in layers for parameter in (layer.weight, layer.bias))


def _states(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def _padding(length: int, kind: str) -> Tensor | None:
    """(B, length): none; left, right and between tokens."""
    if kind == "no mask":
        return None
    mask = torch.zeros(B, length, dtype=torch.bool)
    if kind == "padded":
        mask[0, :3], mask[1, -9:], mask[2, 5] = True, True, True
    return mask


def _same(
    results: tuple[Tensor, Tensor], inputs: list[Tensor], padding: Tensor | None, length: int
) -> None:
    """Compare outputs and gradients at tokens."""
    real = torch.ones(length, B, 1, dtype=torch.float64)
    if padding is not None:
        real = real.masked_fill(padding.t()[..., None], 0)
    weights = torch.randn(length, B, C, dtype=torch.float64) * real
    expected, got = results
    torch.testing.assert_close(got * real, expected * real, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad((y * weights).sum(), inputs) for y in results]
    for wanted, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("with_padding", [False, True])
@pytest.mark.parametrize("kind", ["no mask", "no padding", "padded"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_self_attention(p: float, causal: bool, kind: str, with_padding: bool) -> None:
    """Of the same seed: dropout has the masks of FastDropout."""
    attention, x, residual = _attention(p), _states(T, B, C), _states(T, B, C)
    padding = _padding(T, kind)
    # A part of a larger one, as fairseq's.
    future = torch.full((T + 5, T + 5), -torch.inf, dtype=torch.float64).triu(1)[:T, :T]
    bias = future if causal else None
    torch.manual_seed(3)
    y, _ = attention(x, x, x, key_padding_mask=padding, attn_mask=bias, need_weights=False)
    expected = residual + fast_dropout(y, OUTER)
    torch.manual_seed(3)
    got = sublayers.self_attention(
        x,
        residual,
        _pairs(attention.q_proj, attention.k_proj, attention.v_proj),
        _pairs(attention.out_proj),
        Rows.of(x, padding, with_padding=with_padding),
        Heads(HEADS, attention.scaling, bias),
        Draws.new(p),
        Draws.new(OUTER),
    )
    _same((expected, got), [x, residual, *attention.parameters()], padding, T)
    if with_padding and not causal:  # padding is computed like tokens; causal, it may see no key
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["no mask", "padded"])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_cross_attention(p: float, kind: str) -> None:
    attention, x, residual = _attention(p), _states(T, B, C), _states(T, B, C)
    memory = _states(S, B, C)
    padding, of_memory = _padding(T, kind), _padding(S, kind)
    torch.manual_seed(3)
    y, _ = attention(x, memory, memory, key_padding_mask=of_memory, need_weights=False)
    expected = residual + fast_dropout(y, OUTER)
    torch.manual_seed(3)
    got = sublayers.cross_attention(
        x,
        memory,
        residual,
        _pairs(attention.q_proj, attention.k_proj, attention.v_proj),
        _pairs(attention.out_proj),
        Rows.of(x, padding, with_padding=False),
        Rows.of(memory, of_memory, with_padding=False),
        Heads(HEADS, attention.scaling, None),
        Draws.new(p),
        Draws.new(OUTER),
    )
    _same((expected, got), [x, memory, residual, *attention.parameters()], padding, T)


@pytest.mark.parametrize("kind", ["no mask", "padded"])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_feed_forward(p: float, kind: str) -> None:
    torch.manual_seed(1)
    first, second = nn.Linear(C, 40).double(), nn.Linear(40, C).double()
    x, residual, padding = _states(T, B, C), _states(T, B, C), _padding(T, kind)
    torch.manual_seed(3)
    hidden = fast_dropout(F.relu(first(x)), p)
    expected = residual + fast_dropout(second(hidden), OUTER)
    torch.manual_seed(3)
    rows = Rows.of(x, padding, with_padding=False)
    draws = Draws.new(p), Draws.new(OUTER)
    got = sublayers.feed_forward(x, residual, _pairs(first), _pairs(second), rows, *draws)
    inputs = [x, residual, *first.parameters(), *second.parameters()]
    _same((expected, got), inputs, padding, T)
    if padding is not None:
        assert torch.equal(got[padding.t()], residual[padding.t()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_products_change_roundings_only(dtype: torch.dtype) -> None:
    attention, x = _attention(0.2), _states(T, B, C)
    padding = _padding(T, "padded")
    results = []
    for narrow in (torch.float64, dtype):
        module = attention if narrow == torch.float64 else _attention(0.2).float()
        states = x.detach().to(next(module.parameters()).dtype).requires_grad_()
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow == torch.bfloat16):
            y = sublayers.self_attention(
                states,
                states,
                _pairs(module.q_proj, module.k_proj, module.v_proj),
                _pairs(module.out_proj),
                Rows.of(states, padding, with_padding=False),
                Heads(HEADS, module.scaling, None),
                Draws.new(0.2),
                Draws.new(OUTER),
            )
        assert y.dtype == states.dtype
        parameters = [module.q_proj.weight, module.v_proj.bias, module.out_proj.weight]
        results.append([y, *torch.autograd.grad(y.square().sum(), [states, *parameters])])
    for expected, got in zip(*results, strict=True):
        error = (got.double() - expected).norm() / expected.norm()
        assert error < {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]


def test_threads_do_not_matter() -> None:
    attention, found, threads = _attention(0.3), [], torch.get_num_threads()
    x = _states(T, B, C)
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            torch.manual_seed(3)
            y = sublayers.self_attention(
                x,
                x,
                _pairs(attention.q_proj, attention.k_proj, attention.v_proj),
                _pairs(attention.out_proj),
                Rows.of(x, None, with_padding=False),
                Heads(HEADS, attention.scaling, None),
                Draws.new(0.3),
                Draws.new(OUTER),
            )
            found.append([y, *torch.autograd.grad(y.sin().sum(), [x])])
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)  # products are torch's


def test_a_sentence_of_padding_alone_spoils_nothing() -> None:
    attention, x = _attention(0.0), _states(T, B, C)
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[1] = True
    for with_padding in (False, True):
        y = sublayers.self_attention(
            x,
            x,
            _pairs(attention.q_proj, attention.k_proj, attention.v_proj),
            _pairs(attention.out_proj),
            Rows.of(x, padding, with_padding=with_padding),
            Heads(HEADS, attention.scaling, None),
            Draws.new(0.0),
            Draws.new(0.0),
        )
        gradients = torch.autograd.grad(y.sum(), [x, *attention.parameters()])
        assert y.isfinite().all() and all(g.isfinite().all() for g in gradients)


def test_few_numbers_of_rows() -> None:
    counts = range(1, 5000)
    rounded = [rounded_up(count) for count in counts]
    assert all(0 <= r - count <= count / 8 for r, count in zip(rounded, counts, strict=True))
    assert len({r for r in rounded if 2048 < r <= 4096}) == 8
    assert rounded[:8] == list(range(1, 9)) and rounded_up(0) == 0
