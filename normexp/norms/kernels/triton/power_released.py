"""PN as released: one step of training, forward and backward. Imports triton.

Equations and rules of the state: normexp/norms/power_released.py, running_norm.py. A program has
the channels of one group. Statistics of several ranks are left to the plain implementation; the
sums over tokens and what is made of them are kernels of their own, between which a sum over ranks
would have its place.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from normexp.norms.kernels.triton import tokens
from normexp.norms.kernels.triton.tiles import ALWAYS, Tiles, check_buffers, sums_type

_FOLDED_AT_ONCE = 32  # channels


@triton.jit
def _group_of_program(size: tl.constexpr, WIDTH: tl.constexpr):
    position = tl.arange(0, WIDTH)
    return tl.program_id(0) * size + position, position < size


@triton.jit
def _inverse_rms(values, size: tl.constexpr, eps: tl.constexpr):
    return 1.0 / tl.sqrt(tl.sum(values * values, axis=1) / size + eps)


@triton.jit
def _sum_squares(
    x,
    sums,
    counts,
    step,
    warmup_steps,
    mask,
    rows,
    channels,
    sentences,
    sentence_stride,
    time_stride,
    size: tl.constexpr,
    eps: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SUMS_IN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    if tl.load(step) < warmup_steps:
        channel, within = _group_of_program(size, WIDTH)
        squares = tl.zeros([ROWS, WIDTH], SUMS_IN)
        seen = tl.zeros([ROWS], tl.int32)
        stride = tl.num_programs(1) * ROWS
        for first in range(tl.program_id(1) * ROWS, rows, stride):
            at, _, real = tokens.tile_of_rows(
                first, mask, rows, channels, sentences, sentence_stride, time_stride, HAS_MASK, ROWS
            )
            wanted = real[:, None] & within[None, :]
            value = tl.load(x + at + channel[None, :], mask=wanted, other=0.0).to(SUMS_IN)
            scaled = value * _inverse_rms(value, size, eps)[:, None]
            squares += scaled * scaled
            seen += real.to(tl.int32)
        tokens.store_sums(sums, channels, channel, within, squares)
        tokens.store_count(counts, seen)


@triton.jit
def _fold(
    sums, totals, step, last_step, programs, channels, MANY: tl.constexpr, WIDTH: tl.constexpr
):
    if tl.load(step) < last_step:
        channel, within = tokens.channels_of_program(channels, WIDTH)
        quantity = tl.program_id(1)
        of_quantity = sums + quantity * programs * channels
        result = tokens.total(of_quantity, programs, channels, channel, within, MANY, WIDTH)
        tl.store(totals + quantity * channels + channel, result, mask=within)


@triton.jit
def _scale(
    x,
    y,
    r,
    weight,
    bias,
    statistic,
    batch_total,
    batch_counts,
    sums,
    counts,
    step,
    warmup_steps,
    mask,
    rows,
    channels,
    sentences,
    sentence_stride,
    time_stride,
    size: tl.constexpr,
    eps: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SUMS_IN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    MANY: tl.constexpr,
):
    channel, within = _group_of_program(size, WIDTH)
    psi2 = tokens.values_at(statistic, channel, within)
    if tl.load(step) < warmup_steps:
        n = tokens.total_count(batch_counts, tl.num_programs(1), MANY)
        psi2 = tokens.values_at(batch_total, channel, within) / tl.maximum(n, 1.0)
    scale = (tokens.values_at(weight, channel, within) / tl.sqrt(psi2 + eps)).to(SUMS_IN)
    shift = tokens.values_at(bias, channel, within).to(SUMS_IN)
    of_real = tl.zeros([ROWS, WIDTH], SUMS_IN)
    of_padding = tl.zeros([ROWS, WIDTH], SUMS_IN)
    seen = tl.zeros([ROWS], tl.int32)
    stride = tl.num_programs(1) * ROWS
    for first in range(tl.program_id(1) * ROWS, rows, stride):
        at, inside, real = tokens.tile_of_rows(
            first, mask, rows, channels, sentences, sentence_stride, time_stride, HAS_MASK, ROWS
        )
        wanted = inside[:, None] & within[None, :]
        value = tl.load(x + at + channel[None, :], mask=wanted, other=0.0).to(SUMS_IN)
        inverse = _inverse_rms(value, size, eps)
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        tl.store(r + row * tl.num_programs(0) + tl.program_id(0), inverse, mask=inside)
        scaled = value * inverse[:, None]
        result = scaled * scale[None, :] + shift[None, :]
        tl.store(y + at + channel[None, :], result, mask=wanted)
        squares = scaled * scaled
        of_real += tl.where(real[:, None], squares, 0.0)
        of_padding += tl.where(real[:, None], 0.0, squares)
        seen += real.to(tl.int32)
    tokens.store_sums(sums, channels, channel, within, of_real)
    second = sums + tl.num_programs(1) * channels
    tokens.store_sums(second, channels, channel, within, of_padding)
    tokens.store_count(counts, seen)


@triton.jit
def _finish_forward(
    totals,
    counts,
    running,
    step,
    rejected,
    warmup_steps,
    real_squares,
    squares,
    taken,
    programs,
    channels,
    pace: tl.constexpr,
    MANY: tl.constexpr,
    WIDTH: tl.constexpr,
):
    channel, within = tokens.channels_of_program(channels, WIDTH)
    s = tl.load(step) + 1
    seen = tokens.total_count(counts, programs, MANY)
    of_real = tokens.values_at(totals, channel, within)
    of_padding = tokens.values_at(totals + channels, channel, within)
    of_batch = of_real / tl.maximum(seen, 1.0)
    before = tokens.values_at(running, channel, within)
    tl.store(real_squares + channel, of_real, mask=within)
    tl.store(squares + channel, of_real + of_padding, mask=within)
    by_batch = s <= warmup_steps
    tl.store(taken + channel, tl.where(by_batch, of_batch, before), mask=within)
    tl.store(taken + channels + channel, of_batch, mask=within)
    tl.store(taken + 2 * channels, by_batch.to(tl.float64))
    tl.store(taken + 2 * channels + 1, seen)
    finite = tokens.all_finite(of_batch, within, running)
    usable = finite & (seen > 0)
    steps = s.to(tl.float64)
    cumulative = (before * (steps - 1.0) + of_batch) / steps
    after = tokens.lerp(tl.where(s < warmup_steps, cumulative, before), of_batch, pace)
    tl.store(running + channel, tl.where(usable, after, before), mask=within)
    tokens.count_one_if(step, usable)
    tokens.count_one_if(rejected, (seen > 0) & (finite == 0))


@triton.jit
def _propagate(
    x,
    gradient,
    dx,
    r,
    weight,
    taken,
    e,
    sums,
    mask,
    rows,
    channels,
    sentences,
    sentence_stride,
    time_stride,
    size: tl.constexpr,
    eps: tl.constexpr,
    pace: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SUMS_IN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    channel, within = _group_of_program(size, WIDTH)
    inverse = 1.0 / tl.sqrt(tokens.values_at(taken, channel, within) + eps)
    batch_inverse = 1.0 / tl.sqrt(tokens.values_at(taken + channels, channel, within) + eps)
    factor = pace * tokens.values_at(e, channel, within)
    scale = (tokens.values_at(weight, channel, within) * batch_inverse).to(SUMS_IN)
    slope = (-factor * inverse * batch_inverse).to(SUMS_IN)
    products = tl.zeros([ROWS, WIDTH], SUMS_IN)
    plain = tl.zeros([ROWS, WIDTH], SUMS_IN)
    stride = tl.num_programs(1) * ROWS
    for first in range(tl.program_id(1) * ROWS, rows, stride):
        at, inside, _ = tokens.tile_of_rows(
            first, mask, rows, channels, sentences, sentence_stride, time_stride, HAS_MASK, ROWS
        )
        wanted = inside[:, None] & within[None, :]
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        of_row = tl.load(r + row * tl.num_programs(0) + tl.program_id(0), mask=inside, other=0.0)
        value = tl.load(x + at + channel[None, :], mask=wanted, other=0.0).to(SUMS_IN)
        g = tl.load(gradient + at + channel[None, :], mask=wanted, other=0.0).to(SUMS_IN)
        scaled = value * of_row[:, None]
        d = g * scale[None, :] + scaled * slope[None, :]
        mean = tl.sum(d * scaled, axis=1) / size
        result = (d - scaled * mean[:, None]) * of_row[:, None]
        tl.store(dx + at + channel[None, :], result, mask=wanted)
        products += g * scaled
        plain += g
    tokens.store_sums(sums, channels, channel, within, products)
    tokens.store_sums(sums + tl.num_programs(1) * channels, channels, channel, within, plain)


@triton.jit
def _finish_backward(
    totals,
    weight,
    taken,
    squares,
    e,
    rejected,
    d_weight,
    d_bias,
    rows,
    channels,
    eps: tl.constexpr,
    pace: tl.constexpr,
    WIDTH: tl.constexpr,
):
    channel, within = tokens.channels_of_program(channels, WIDTH)
    inverse = 1.0 / tl.sqrt(tokens.values_at(taken, channel, within) + eps)
    dw = tokens.values_at(totals, channel, within) * inverse
    tl.store(d_weight + channel, dw, mask=within)
    tl.store(d_bias + channel, tokens.values_at(totals + channels, channel, within), mask=within)
    before = tokens.values_at(e, channel, within)
    x_hat_squares = tokens.values_at(squares, channel, within) * inverse * inverse
    lam = dw * tokens.values_at(weight, channel, within)
    after = before + (lam - pace * before * x_hat_squares) / tl.full([WIDTH], rows, tl.float64)
    finite = tokens.all_finite(after, within, e)
    seen = tl.load(taken + 2 * channels + 1)
    tl.store(e + channel, tl.where(finite & (seen > 0), after, before), mask=within)
    tokens.count_one_if(rejected, (seen > 0) & (finite == 0))


def _launch_fold(tiles: Tiles, sums: Tensor, step: Tensor, last_step: int) -> Tensor:
    """Sums (quantities, P, C) -> (quantities, C), if step < last_step."""
    quantities = sums.shape[0]
    totals = torch.empty(quantities, tiles.channels, dtype=torch.float64, device=sums.device)
    _fold[triton.cdiv(tiles.channels, _FOLDED_AT_ONCE), quantities](
        *(sums, totals, step, last_step, tiles.programs, tiles.channels),
        MANY=min(triton.next_power_of_2(tiles.programs), _FOLDED_AT_ONCE),
        WIDTH=_FOLDED_AT_ONCE,
    )
    return totals


def _launch_scale(
    tiles: Tiles,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistic: Tensor,
    batch_total: Tensor,
    batch_counts: Tensor,
    step: Tensor,
    warmup_steps: int,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y; 1 / rms of the groups (T*B, G); sums (2, C) of squares over tokens, padding; counts."""
    y, sums, counts = torch.empty_like(x), tiles.sums(2), tiles.counts(1)
    r = torch.empty(tiles.rows, groups, dtype=tiles.sums_in, device=x.device)
    _scale[tiles.grid](
        *(x, y, r, weight.contiguous(), bias.contiguous(), statistic, batch_total, batch_counts),
        *(sums, counts, step, warmup_steps),
        size=tiles.channels // groups,
        eps=eps,
        MANY=tiles.many,
        **tiles.arguments,
    )
    return y, r, _launch_fold(tiles, sums, step, ALWAYS), counts


@torch.library.custom_op(
    "normexp::triton_power_released_forward", mutates_args=("running_psi2", "step", "rejected")
)
def _forward_op(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_psi2: Tensor,
    step: Tensor,
    rejected: Tensor,
    groups: int,
    eps: float,
    alpha_fwd: float,
    warmup_steps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_buffers(running_psi2, step, rejected)
    tiles = Tiles(x, mask, groups)
    batch_sums, batch_counts = tiles.sums(1), tiles.counts(1)
    real_squares, squares = tiles.vector(tiles.sums_in), tiles.vector(torch.float64)
    taken = tiles.taken()
    with torch.cuda.device_of(x):
        _sum_squares[tiles.grid](
            *(x, batch_sums, batch_counts, step, warmup_steps),
            size=tiles.channels // groups,
            eps=eps,
            **tiles.arguments,
        )
        batch_total = _launch_fold(tiles, batch_sums, step, warmup_steps)
        y, r, totals, counts = _launch_scale(
            *(tiles, x, weight, bias, running_psi2, batch_total, batch_counts),
            *(step, warmup_steps, groups, eps),
        )
        _finish_forward[(1,)](
            *(totals, counts, running_psi2, step, rejected, warmup_steps),
            *(real_squares, squares, taken),
            pace=1 - alpha_fwd,
            **tiles.finishing,
        )
    return y, real_squares, taken, squares, r


@_forward_op.register_fake
def _(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_psi2: Tensor,
    step: Tensor,
    rejected: Tensor,
    groups: int,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    channels, dtype = x.shape[-1], sums_type(x)
    squares = x.new_empty(channels, dtype=torch.float64)
    return (
        *(torch.empty_like(x), x.new_empty(channels, dtype=dtype)),
        *(x.new_empty(2 * channels + 2, dtype=torch.float64), squares),
        x.new_empty((x.numel() // channels, groups), dtype=dtype),
    )


@torch.library.custom_op("normexp::triton_power_released_again", mutates_args=())
def _again_op(
    x: Tensor, weight: Tensor, bias: Tensor, taken: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    tiles = Tiles(x, None, groups)
    # No step is one of a warm-up: psi2 is used whatever it was. Padded positions have their part.
    step = torch.zeros((), dtype=torch.long, device=x.device)
    with torch.cuda.device_of(x):
        y, r, totals, _ = _launch_scale(
            *(tiles, x, weight, bias, taken, taken, tiles.counts(1), step, 0, groups, eps)
        )
    return y, totals[0].clone(), r


@_again_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, taken: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    r = x.new_empty((rows, groups), dtype=sums_type(x))
    return torch.empty_like(x), x.new_empty(x.shape[-1], dtype=torch.float64), r


@torch.library.custom_op("normexp::triton_power_released_backward", mutates_args=("e", "rejected"))
def _backward_op(
    x: Tensor,
    weight: Tensor,
    taken: Tensor,
    squares: Tensor,
    r: Tensor,
    gradient: Tensor,
    e: Tensor,
    rejected: Tensor,
    groups: int,
    eps: float,
    alpha_bwd: float,
) -> tuple[Tensor, Tensor, Tensor]:
    check_buffers(e, rejected)
    tiles = Tiles(x, None, groups)
    gradient, weight = gradient.contiguous(), weight.contiguous()
    dx, sums = torch.empty_like(x), tiles.sums(2)
    d_weight, d_bias = tiles.vector(tiles.sums_in), tiles.vector(tiles.sums_in)
    options = {"eps": eps, "pace": 1 - alpha_bwd}
    with torch.cuda.device_of(x):
        _propagate[tiles.grid](
            *(x, gradient, dx, r, weight, taken, e, sums),
            size=tiles.channels // groups,
            **options,
            **tiles.arguments,
        )
        totals = _launch_fold(tiles, sums, rejected, ALWAYS)
        _finish_backward[(1,)](
            *(totals, weight, taken, squares, e, rejected, d_weight, d_bias),
            *(max(1, tiles.rows), tiles.channels),
            **options,
            WIDTH=tiles.finishing["WIDTH"],
            num_warps=tiles.finishing["num_warps"],
        )
    return dx, d_weight.to(weight.dtype), d_bias.to(weight.dtype)


@_backward_op.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


class _Released(torch.autograd.Function):
    """x -> y and what the forward took from state and batch; only y where it repeats another."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mask: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        running_psi2: Tensor,
        e: Tensor,
        step: Tensor,
        rejected: Tensor,
        recalled: Tensor | None,
        groups: int,
        eps: float,
        alpha_fwd: float,
        alpha_bwd: float,
        warmup_steps: int,
    ) -> Any:
        if recalled is not None:
            y, squares, r = _again_op(x, weight, bias, recalled, groups, eps)
            taken = recalled
        else:
            state, options = (running_psi2, step, rejected), (groups, eps, alpha_fwd, warmup_steps)
            y, real_squares, taken, squares, r = _forward_op(
                x, mask, weight, bias, *state, *options
            )
        ctx.save_for_backward(x, weight, taken, squares, r)
        # Not among the saved ones, because it may have moved on before backward reads it.
        ctx.e, ctx.rejected = e, rejected
        ctx.options = groups, eps, alpha_bwd
        if recalled is not None:
            return y
        ctx.mark_non_differentiable(real_squares, taken)
        return y, real_squares, taken

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        state = ctx.e, ctx.rejected
        dx, d_weight, d_bias = _backward_op(*ctx.saved_tensors, gradient, *state, *ctx.options)
        return dx, None, d_weight, d_bias, *(None,) * 10


def power_released(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_psi2: Tensor,
    e: Tensor,
    step: Tensor,
    rejected: Tensor,
    recalled: Tensor | None,
    groups: int,
    eps: float,
    alpha_fwd: float,
    alpha_bwd: float,
    warmup_steps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """One iteration: x (T, B, C) or (N, C), contiguous, mask (B, T) or (N,) or None -> y.

    Besides y like x, the sums of squares (C,) of the group-scaled real tokens, by which a forward
    that repeats this one will find it, and what this one took from the state, (2 C + 2,): psi2,
    psi2_B, whether psi2 is psi2_B, N. That is then given as `recalled`, and nothing changes.
    running_psi2 (C,), step and rejected change in the forward, e (C,) and rejected in backward.

    Raises ValueError where x or what is to change is not contiguous.
    """
    state, options = (running_psi2, e, step, rejected), (groups, eps, alpha_fwd, alpha_bwd)
    result = _Released.apply(x, mask, weight, bias, *state, recalled, *options, warmup_steps)
    return result if recalled is None else (result, recalled.new_empty(0), recalled)
