"""PN as released: one step of training, forward and backward. Imports triton.

Equations and rules of the state: normexp/norms/power_released.py, running_norm.py. A program has
the channels of one group. Statistics of several ranks are left to plain torch; the sums over tokens
and the kernels that use them are separate, so that a sum over ranks could be taken between them.
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
    """The channels (WIDTH,) of the program's group, and flags: the channel exists."""
    position = tl.arange(0, WIDTH)
    return tl.program_id(0) * size + position, position < size


@triton.jit
def _inverse_rms(values, size: tl.constexpr, eps: tl.constexpr):
    """1 / sqrt(mean of values^2 over the group + eps) per row: (ROWS, WIDTH) -> (ROWS,)."""
    return 1.0 / tl.sqrt(tl.sum(values * values, axis=1) / size + eps)


@triton.jit
def _sum_sq(
    x,
    partial_sums,
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
    """partial_sums (P, C) of xg^2 and counts (P,) over the real tokens, if in the warm-up."""
    if tl.load(step) < warmup_steps:
        channel, within = _group_of_program(size, WIDTH)
        sum_sq = tl.zeros([ROWS, WIDTH], SUMS_IN)
        seen = tl.zeros([ROWS], tl.int32)
        stride = tl.num_programs(1) * ROWS
        for first in range(tl.program_id(1) * ROWS, rows, stride):
            at, _, token_mask = tokens.tile_of_rows(
                first, mask, rows, channels, sentences, sentence_stride, time_stride, HAS_MASK, ROWS
            )
            wanted = token_mask[:, None] & within[None, :]
            value = tl.load(x + at + channel[None, :], mask=wanted, other=0.0).to(SUMS_IN)
            scaled = value * _inverse_rms(value, size, eps)[:, None]
            sum_sq += scaled * scaled
            seen += token_mask.to(tl.int32)
        tokens.store_sums(partial_sums, channels, channel, within, sum_sq)
        tokens.store_count(counts, seen)


@triton.jit
def _fold(
    partial_sums,
    totals,
    step,
    last_step,
    programs,
    channels,
    MANY: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """totals (quantities, C) = partial_sums (quantities, P, C) over P, if step < last_step."""
    if tl.load(step) < last_step:
        channel, within = tokens.channels_of_program(channels, WIDTH)
        quantity = tl.program_id(1)
        of_quantity = partial_sums + quantity * programs * channels
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
    partial_sums,
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
    """xg = x r, y = w xg / sqrt(psi2 + eps) + b; partial sums of xg^2 over tokens, padding."""
    channel, within = _group_of_program(size, WIDTH)
    psi2 = tokens.values_at(statistic, channel, within)
    if tl.load(step) < warmup_steps:
        n = tokens.total_count(batch_counts, tl.num_programs(1), MANY)
        of_batch = tokens.values_at(batch_total, channel, within) / tl.maximum(n, 1.0)
        psi2 = tl.where(n > 0, of_batch, psi2)
    scale = (tokens.values_at(weight, channel, within) / tl.sqrt(psi2 + eps)).to(SUMS_IN)
    shift = tokens.values_at(bias, channel, within).to(SUMS_IN)
    of_tokens = tl.zeros([ROWS, WIDTH], SUMS_IN)
    of_padding = tl.zeros([ROWS, WIDTH], SUMS_IN)
    seen = tl.zeros([ROWS], tl.int32)
    stride = tl.num_programs(1) * ROWS
    for first in range(tl.program_id(1) * ROWS, rows, stride):
        at, inside, token_mask = tokens.tile_of_rows(
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
        sum_sq = scaled * scaled
        of_tokens += tl.where(token_mask[:, None], sum_sq, 0.0)
        of_padding += tl.where(token_mask[:, None], 0.0, sum_sq)
        seen += token_mask.to(tl.int32)
    tokens.store_sums(partial_sums, channels, channel, within, of_tokens)
    second = partial_sums + tl.num_programs(1) * channels
    tokens.store_sums(second, channels, channel, within, of_padding)
    tokens.store_count(counts, seen)


@triton.jit
def _finish_forward(
    totals,
    counts,
    running,
    step,
    num_rejected,
    warmup_steps,
    token_sum_sq,
    sum_sq,
    saved,
    programs,
    channels,
    update_rate: tl.constexpr,
    MANY: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """From the totals: psi2_B, what is saved for backward, the new psi2 and step."""
    channel, within = tokens.channels_of_program(channels, WIDTH)
    s = tl.load(step) + 1
    seen = tokens.total_count(counts, programs, MANY)
    of_tokens = tokens.values_at(totals, channel, within)
    of_padding = tokens.values_at(totals + channels, channel, within)
    before = tokens.values_at(running, channel, within)
    # Of no token there is no statistic, and the running one stands in for it.
    of_batch = tl.where(seen > 0, of_tokens / tl.maximum(seen, 1.0), before)
    tl.store(token_sum_sq + channel, of_tokens, mask=within)
    tl.store(sum_sq + channel, of_tokens + of_padding, mask=within)
    by_batch = s <= warmup_steps
    tl.store(saved + channel, tl.where(by_batch, of_batch, before), mask=within)
    tl.store(saved + channels + channel, of_batch, mask=within)
    tl.store(saved + 2 * channels, by_batch.to(tl.float64))
    tl.store(saved + 2 * channels + 1, seen)
    finite = tokens.all_finite(of_batch, within, running)
    usable = finite & (seen > 0)
    steps = s.to(tl.float64)
    cumulative = (before * (steps - 1.0) + of_batch) / steps
    after = tokens.lerp(tl.where(s < warmup_steps, cumulative, before), of_batch, update_rate)
    tl.store(running + channel, tl.where(usable, after, before), mask=within)
    tokens.count_one_if(step, usable)
    tokens.count_one_if(num_rejected, (seen > 0) & (finite == 0))


@triton.jit
def _propagate(
    x,
    gradient,
    dx,
    r,
    weight,
    saved,
    e,
    partial_sums,
    mask,
    rows,
    channels,
    sentences,
    sentence_stride,
    time_stride,
    size: tl.constexpr,
    eps: tl.constexpr,
    update_rate: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SUMS_IN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """dx through x_tilde and the group scaling; partial sums of dL/dy xg and of dL/dy."""
    channel, within = _group_of_program(size, WIDTH)
    inverse = 1.0 / tl.sqrt(tokens.values_at(saved, channel, within) + eps)
    batch_inverse = 1.0 / tl.sqrt(tokens.values_at(saved + channels, channel, within) + eps)
    seen = tl.load(saved + 2 * channels + 1)
    factor = tl.where(seen > 0, update_rate * tokens.values_at(e, channel, within), 0.0)
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
    tokens.store_sums(partial_sums, channels, channel, within, products)
    tokens.store_sums(
        partial_sums + tl.num_programs(1) * channels, channels, channel, within, plain
    )


@triton.jit
def _finish_backward(
    totals,
    weight,
    saved,
    sum_sq,
    e,
    num_rejected,
    d_weight,
    d_bias,
    rows,
    channels,
    eps: tl.constexpr,
    update_rate: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """From the totals: d_weight, d_bias (C,) and the new e."""
    channel, within = tokens.channels_of_program(channels, WIDTH)
    inverse = 1.0 / tl.sqrt(tokens.values_at(saved, channel, within) + eps)
    dw = tokens.values_at(totals, channel, within) * inverse
    tl.store(d_weight + channel, dw, mask=within)
    tl.store(d_bias + channel, tokens.values_at(totals + channels, channel, within), mask=within)
    before = tokens.values_at(e, channel, within)
    x_hat_squares = tokens.values_at(sum_sq, channel, within) * inverse * inverse
    lambda_ = dw * tokens.values_at(weight, channel, within)
    after = before + (lambda_ - update_rate * before * x_hat_squares) / tl.full(
        [WIDTH], rows, tl.float64
    )
    finite = tokens.all_finite(after, within, e)
    seen = tl.load(saved + 2 * channels + 1)
    tl.store(e + channel, tl.where(finite & (seen > 0), after, before), mask=within)
    tokens.count_one_if(num_rejected, (seen > 0) & (finite == 0))


def _launch_fold(tiles: Tiles, partial_sums: Tensor, step: Tensor, last_step: int) -> Tensor:
    """partial_sums (quantities, P, C) -> totals (quantities, C), if step < last_step."""
    quantities = partial_sums.shape[0]
    totals = torch.empty(
        quantities, tiles.channels, dtype=torch.float64, device=partial_sums.device
    )
    _fold[triton.cdiv(tiles.channels, _FOLDED_AT_ONCE), quantities](
        *(partial_sums, totals, step, last_step, tiles.programs, tiles.channels),
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
    """y; 1 / rms of the groups (T*B, G); sums (2, C) of xg^2 over tokens and padding; counts."""
    y, partial_sums, counts = torch.empty_like(x), tiles.partial_sums(2), tiles.counts(1)
    r = torch.empty(tiles.rows, groups, dtype=tiles.sums_in, device=x.device)
    _scale[tiles.grid](
        *(x, y, r, weight.contiguous(), bias.contiguous(), statistic, batch_total, batch_counts),
        *(partial_sums, counts, step, warmup_steps),
        size=tiles.channels // groups,
        eps=eps,
        MANY=tiles.many,
        **tiles.arguments,
    )
    return y, r, _launch_fold(tiles, partial_sums, step, ALWAYS), counts


@torch.library.custom_op(
    "normexp::triton_power_released_forward", mutates_args=("running_psi2", "step", "num_rejected")
)
def _forward_op(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_psi2: Tensor,
    step: Tensor,
    num_rejected: Tensor,
    groups: int,
    eps: float,
    alpha_fwd: float,
    warmup_steps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_buffers(running_psi2, step, num_rejected)
    tiles = Tiles(x, mask, groups)
    batch_sums, batch_counts = tiles.partial_sums(1), tiles.counts(1)
    token_sum_sq, sum_sq = tiles.vector(tiles.sums_in), tiles.vector(torch.float64)
    saved = tiles.saved()
    with torch.cuda.device_of(x):
        _sum_sq[tiles.grid](
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
            *(totals, counts, running_psi2, step, num_rejected, warmup_steps),
            *(token_sum_sq, sum_sq, saved),
            update_rate=1 - alpha_fwd,
            **tiles.finishing,
        )
    return y, token_sum_sq, saved, sum_sq, r


@_forward_op.register_fake
def _(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_psi2: Tensor,
    step: Tensor,
    num_rejected: Tensor,
    groups: int,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    channels, dtype = x.shape[-1], sums_type(x)
    sum_sq = x.new_empty(channels, dtype=torch.float64)
    return (
        *(torch.empty_like(x), x.new_empty(channels, dtype=dtype)),
        *(x.new_empty(2 * channels + 2, dtype=torch.float64), sum_sq),
        x.new_empty((x.numel() // channels, groups), dtype=dtype),
    )


@torch.library.custom_op("normexp::triton_power_released_replay", mutates_args=())
def _replay_op(
    x: Tensor, weight: Tensor, bias: Tensor, saved: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    tiles = Tiles(x, None, groups)
    # No step is one of a warm-up: psi2 is used whatever it was. Padded positions count.
    step = torch.zeros((), dtype=torch.long, device=x.device)
    with torch.cuda.device_of(x):
        y, r, totals, _ = _launch_scale(
            *(tiles, x, weight, bias, saved, saved, tiles.counts(1), step, 0, groups, eps)
        )
    return y, totals[0].clone(), r


@_replay_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, saved: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    r = x.new_empty((rows, groups), dtype=sums_type(x))
    return torch.empty_like(x), x.new_empty(x.shape[-1], dtype=torch.float64), r


@torch.library.custom_op(
    "normexp::triton_power_released_backward", mutates_args=("e", "num_rejected")
)
def _backward_op(
    x: Tensor,
    weight: Tensor,
    saved: Tensor,
    sum_sq: Tensor,
    r: Tensor,
    gradient: Tensor,
    e: Tensor,
    num_rejected: Tensor,
    groups: int,
    eps: float,
    alpha_bwd: float,
) -> tuple[Tensor, Tensor, Tensor]:
    check_buffers(e, num_rejected)
    tiles = Tiles(x, None, groups)
    gradient, weight = gradient.contiguous(), weight.contiguous()
    dx, partial_sums = torch.empty_like(x), tiles.partial_sums(2)
    d_weight, d_bias = tiles.vector(tiles.sums_in), tiles.vector(tiles.sums_in)
    options = {"eps": eps, "update_rate": 1 - alpha_bwd}
    with torch.cuda.device_of(x):
        _propagate[tiles.grid](
            *(x, gradient, dx, r, weight, saved, e, partial_sums),
            size=tiles.channels // groups,
            **options,
            **tiles.arguments,
        )
        totals = _launch_fold(tiles, partial_sums, num_rejected, ALWAYS)
        _finish_backward[(1,)](
            *(totals, weight, saved, sum_sq, e, num_rejected, d_weight, d_bias),
            *(max(1, tiles.rows), tiles.channels),
            **options,
            WIDTH=tiles.finishing["WIDTH"],
            num_warps=tiles.finishing["num_warps"],
        )
    return dx, d_weight.to(weight.dtype), d_bias.to(weight.dtype)


@_backward_op.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


class _PowerReleasedFunction(torch.autograd.Function):
    """PN as released: x -> y, sums of xg^2 and what the forward saved; only y in a replay."""

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
        num_rejected: Tensor,
        replayed: Tensor | None,
        groups: int,
        eps: float,
        alpha_fwd: float,
        alpha_bwd: float,
        warmup_steps: int,
    ) -> Any:
        if replayed is not None:
            y, sum_sq, r = _replay_op(x, weight, bias, replayed, groups, eps)
            saved = replayed
        else:
            state, options = (
                (running_psi2, step, num_rejected),
                (groups, eps, alpha_fwd, warmup_steps),
            )
            y, token_sum_sq, saved, sum_sq, r = _forward_op(x, mask, weight, bias, *state, *options)
        ctx.save_for_backward(x, weight, saved, sum_sq, r)
        # Not among the saved ones, because it may have moved on before backward reads it.
        ctx.e, ctx.num_rejected = e, num_rejected
        ctx.options = groups, eps, alpha_bwd
        if replayed is not None:
            return y
        ctx.mark_non_differentiable(token_sum_sq, saved)
        return y, token_sum_sq, saved

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        state = ctx.e, ctx.num_rejected
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
    num_rejected: Tensor,
    replayed: Tensor | None,
    groups: int,
    eps: float,
    alpha_fwd: float,
    alpha_bwd: float,
    warmup_steps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """One iteration: x (T, B, C) or (N, C), contiguous, mask (B, T) or (N,) or None -> y.

    Returns y like x; the sums of xg^2 (C,) over the real tokens, xg the group-scaled x, by which a
    forward that repeats this one is recognised; and what this one saved, (2 C + 2,): psi2, psi2_B,
    whether psi2 is psi2_B, N. The repeated forward passes the latter as `replayed`, and changes
    nothing. Otherwise running_psi2 (C,), step and num_rejected change in the forward, e (C,) and
    num_rejected in backward.

    Raises ValueError where x or a buffer that changes is not contiguous.
    """
    state, options = (running_psi2, e, step, num_rejected), (groups, eps, alpha_fwd, alpha_bwd)
    result = _PowerReleasedFunction.apply(
        x, mask, weight, bias, *state, replayed, *options, warmup_steps
    )
    return result if replayed is None else (result, replayed.new_empty(0), replayed)
