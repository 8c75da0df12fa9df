"""Attention and feed-forward sublayers of a Transformer for training on the CPU, in few passes.

Between its matrix products a sublayer reads and writes the hidden states as rarely as possible:
one pass takes the tokens out of the padding and converts them, one adds the output, dropped, to
the residual, and attention computes scores, softmax, dropout and mixture of a head while they lie
in the cache. Padding takes no part in the products, whose number of rows is rounded up (see
row_counts.py).

The masks of dropout are those of `FastDropout` at the same places: the same seed gives the same
ones. sublayers.cpp has the operators; without a compiler none of this can be used.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from normexp.fairseq_plugin.dropout import Draws
from normexp.fairseq_plugin.row_counts import rounded_up
from normexp.norms.kernels import native

_SOURCE = Path(__file__).with_suffix(".cpp")


def compiled() -> bool:
    """Return whether the operators of sublayers.cpp can be used; the first call compiles them."""
    return native.load(_SOURCE)


class Rows(NamedTuple):
    """Which places of states (T, B, C) are computed, as int32 indices into the T B places."""

    places: Tensor  # (N,): the place of each row
    slots: Tensor  # (T B,): the row of each place, or -1
    tokens: Tensor  # (T B,): the same, and -1 at padding that is computed nevertheless
    total: int  # N rounded up

    @classmethod
    def of(cls, states: Tensor, padding_mask: Tensor | None, *, with_padding: bool) -> "Rows":
        """Rows of the tokens of states (T, B, C), of padding too if `with_padding`.

        padding_mask: (B, T), True or nonzero = padding; None: there is none.
        """
        places = torch.arange(states.shape[0] * states.shape[1], dtype=torch.int32)
        slots = tokens = places
        if padding_mask is not None:
            is_padding = padding_mask.bool().t().reshape(-1)
            if with_padding:
                tokens = slots.masked_fill(is_padding, -1)
            else:
                places = (~is_padding).nonzero().squeeze(1).int()
                slots = (~is_padding).cumsum(0, dtype=torch.int32).sub_(1)
                slots = tokens = slots.masked_fill_(is_padding, -1)
        return cls(places, slots, tokens, rounded_up(len(places)))


class Heads(NamedTuple):
    """How attention divides its channels, and what it adds to the scores."""

    number: int
    scale: float
    bias: Tensor | None  # (T, S)


def feed_forward(
    x: Tensor,
    residual: Tensor,
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    rows: Rows,
    inner: Draws,
    outer: Draws,
) -> Tensor:
    """residual + dropped(W2 dropped(relu(W1 x + b1)) + b2), for x and residual (T, B, C).

    first, second: (W1, b1) and (W2, b2). At places without a row the result is the residual. Under
    autocast the products have its type.
    """
    return _FeedForward.apply(x, residual, *first, *second, rows, inner, outer)


def self_attention(
    x: Tensor,
    residual: Tensor,
    projections: tuple[Tensor, ...],
    out: tuple[Tensor, Tensor],
    rows: Rows,
    heads: Heads,
    weights: Draws,
    outer: Draws,
) -> Tensor:
    """residual + dropped(attention of x with itself), for x and residual (T, B, C).

    projections: weight and bias of queries, of keys and of values; out: of the outputs. weights:
    dropout of the attention weights. The rest is as in `feed_forward`.
    """
    return _SelfAttention.apply(x, residual, *projections, *out, rows, heads, weights, outer)


def cross_attention(
    x: Tensor,
    memory: Tensor,
    residual: Tensor,
    projections: tuple[Tensor, ...],
    out: tuple[Tensor, Tensor],
    rows: Rows,
    memory_rows: Rows,
    heads: Heads,
    weights: Draws,
    outer: Draws,
) -> Tensor:
    """The same with keys and values of memory (S, B, C')."""
    return _CrossAttention.apply(
        x, memory, residual, *projections, *out, rows, memory_rows, heads, weights, outer
    )


def _narrow_type(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


_KEPT = Draws(0, 0, 0)


def _take(states: Tensor, rows: Rows, narrow: torch.dtype, draws: Draws = _KEPT) -> Tensor:
    return torch.ops.normexp.take_rows(states.contiguous(), rows.places, rows.total, narrow, *draws)


def _put(
    values: Tensor, rows: Rows, like: Tensor, residual: Tensor | None = None, draws: Draws = _KEPT
) -> Tensor:
    residual = residual if residual is None else residual.contiguous()
    return torch.ops.normexp.put_rows(values, rows.slots, like.shape, residual, *draws)


class _Linear(NamedTuple):
    """A linear layer in the narrow type."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, parameters: tuple[Tensor, ...], narrow: torch.dtype) -> "_Linear":
        """Several layers of the same input, (weight, bias, weight, bias, ...), as one."""
        if len(parameters) == 2:
            return cls(*(parameter.to(narrow) for parameter in parameters))
        return cls(*(torch.cat([p.to(narrow) for p in parameters[i::2]]) for i in (0, 1)))

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def backward(
        self, x: Tensor, gradient: Tensor, wide: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, weight and bias; the latter two in the wide type."""
        by_weight = (x.t() @ gradient).t() if x.shape[1] < gradient.shape[1] else gradient.t() @ x
        return gradient @ self.weight, by_weight.to(wide), torch.ops.normexp.sum_of_rows(gradient)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, *rest: Any) -> Tensor:
        *parameters, rows, inner, outer = rest
        narrow = _narrow_type(x)
        with torch.autocast("cpu", enabled=False):
            first, second = _Linear.of(parameters[:2], narrow), _Linear.of(parameters[2:], narrow)
            taken = _take(x, rows, narrow)
            hidden = first(taken)
            torch.ops.normexp.relu_dropped_(hidden, rows.places, *inner)
            out = _put(second(hidden), rows, x, residual, outer)
        ctx.save_for_backward(taken, hidden, *first, *second)
        ctx.about = rows, inner, outer
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        taken, hidden, *narrow = ctx.saved_tensors
        first, second = _Linear(*narrow[:2]), _Linear(*narrow[2:])
        rows, inner, outer = ctx.about
        wide = gradient.dtype
        by_out = _take(gradient, rows, taken.dtype, outer)
        by_hidden, *by_second = second.backward(hidden, by_out, wide)
        torch.ops.normexp.relu_dropped_backward_(by_hidden, hidden, inner.threshold)
        by_taken, *by_first = first.backward(taken, by_hidden, wide)
        by_x = _put(by_taken, rows, gradient)
        return by_x, gradient, *by_first, *by_second, None, None, None


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, *rest: Any) -> Tensor:
        *parameters, rows, heads, weights, outer = rest
        narrow = _narrow_type(x)
        with torch.autocast("cpu", enabled=False):
            into, out = _Linear.of(parameters[:6], narrow), _Linear.of(parameters[6:], narrow)
            taken = _take(x, rows, narrow)
            projected = into(taken)
            mixed, denominators = _attend(
                projected.chunk(3, dim=1), rows, rows, x.shape[1], heads, weights
            )
            states = _put(out(mixed), rows, x, residual, outer)
        ctx.save_for_backward(taken, projected, mixed, denominators, *into, *out)
        ctx.about = rows, heads, weights, outer
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        taken, projected, mixed, denominators, *narrow = ctx.saved_tensors
        into, out = _Linear(*narrow[:2]), _Linear(*narrow[2:])
        rows, heads, weights, outer = ctx.about
        wide = gradient.dtype
        by_mixed, *by_out = out.backward(mixed, _take(gradient, rows, taken.dtype, outer), wide)
        by_projected = torch.zeros_like(projected)
        _attend_backward(
            by_mixed, projected.chunk(3, dim=1), by_projected.chunk(3, dim=1), rows, rows,
            denominators, heads, weights,
        )  # fmt: skip
        by_taken, by_weight, by_bias = into.backward(taken, by_projected, wide)
        by_parameters = _interleaved(by_weight.chunk(3), by_bias.chunk(3))
        by_x = _put(by_taken, rows, gradient)
        return by_x, gradient, *by_parameters, *by_out, None, None, None, None


class _CrossAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, memory: Tensor, residual: Tensor, *rest: Any) -> Tensor:
        *parameters, rows, memory_rows, heads, weights, outer = rest
        narrow = _narrow_type(x)
        with torch.autocast("cpu", enabled=False):
            layers = [_Linear.of(parameters[i:j], narrow) for i, j in ((0, 2), (2, 6), (6, 8))]
            to_queries, to_pairs, out = layers
            taken, remembered = _take(x, rows, narrow), _take(memory, memory_rows, narrow)
            queries, pairs = to_queries(taken), to_pairs(remembered)
            mixed, denominators = _attend(
                (queries, *pairs.chunk(2, dim=1)), rows, memory_rows, x.shape[1], heads, weights
            )
            states = _put(out(mixed), rows, x, residual, outer)
        ctx.save_for_backward(
            taken, remembered, queries, pairs, mixed, denominators,
            *to_queries, *to_pairs, *out,
        )  # fmt: skip
        ctx.about = rows, memory_rows, heads, weights, outer, memory.shape
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        taken, remembered, queries, pairs, mixed, denominators, *narrow = ctx.saved_tensors
        to_queries, to_pairs, out = (_Linear(*narrow[i : i + 2]) for i in (0, 2, 4))
        rows, memory_rows, heads, weights, outer, memory_shape = ctx.about
        wide = gradient.dtype
        by_mixed, *by_out = out.backward(mixed, _take(gradient, rows, taken.dtype, outer), wide)
        by_queries, by_pairs = torch.zeros_like(queries), torch.zeros_like(pairs)
        _attend_backward(
            by_mixed, (queries, *pairs.chunk(2, dim=1)), (by_queries, *by_pairs.chunk(2, dim=1)),
            rows, memory_rows, denominators, heads, weights,
        )  # fmt: skip
        by_taken, *by_to_queries = to_queries.backward(taken, by_queries, wide)
        by_remembered, by_weight, by_bias = to_pairs.backward(remembered, by_pairs, wide)
        by_parameters = (*by_to_queries, *_interleaved(by_weight.chunk(2), by_bias.chunk(2)))
        by_x = _put(by_taken, rows, gradient)
        by_memory = torch.ops.normexp.put_rows(
            by_remembered, memory_rows.slots, memory_shape, None, *_KEPT
        )
        return by_x, by_memory, gradient, *by_parameters, *by_out, None, None, None, None, None


def _interleaved(weights: tuple[Tensor, ...], biases: tuple[Tensor, ...]) -> list[Tensor]:
    return [part for pair in zip(weights, biases, strict=True) for part in pair]


def _attend(
    projected: tuple[Tensor, ...],
    rows: Rows,
    key_rows: Rows,
    sentences: int,
    heads: Heads,
    draws: Draws,
) -> tuple[Tensor, Tensor]:
    return torch.ops.normexp.attend(
        *projected, rows.slots, key_rows.tokens, sentences, heads.number, heads.scale, heads.bias,
        *draws,
    )  # fmt: skip


def _attend_backward(
    by_mixed: Tensor,
    projected: tuple[Tensor, ...],
    by_projected: tuple[Tensor, ...],
    rows: Rows,
    key_rows: Rows,
    denominators: Tensor,
    heads: Heads,
    draws: Draws,
) -> None:
    torch.ops.normexp.attend_backward(
        by_mixed, *projected, *by_projected, rows.slots, key_rows.tokens, denominators,
        heads.scale, heads.bias, *draws,
    )  # fmt: skip
