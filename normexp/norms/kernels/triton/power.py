"""PN (Algorithm 2) and PN-V: one step of training, forward and backward. Imports triton.

Equations and rules of the state: normexp/norms/power.py, power_v.py, running_norm.py. PN-V is PN
in a warm-up that never ends, without nu. Statistics of several ranks are left to the plain
implementation; the sums over tokens and what is made of them are kernels of their own, between
which a sum over ranks would have its place.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from normexp.norms.core.masking import flatten_tokens, only_real, real_mean
from normexp.norms.kernels.triton import tokens
from normexp.norms.kernels.triton.tiles import ALWAYS, Tiles, check_buffers, sums_type


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
    HAS_MASK: tl.constexpr,
    SUMS_IN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    if tl.load(step) < warmup_steps:
        channel, within = tokens.channels_of_program(channels, WIDTH)
        squares = tl.zeros([ROWS, WIDTH], SUMS_IN)
        seen = tl.zeros([ROWS], tl.int32)
        stride = tl.num_programs(1) * ROWS
        for first in range(tl.program_id(1) * ROWS, rows, stride):
            at, _, real = tokens.tile_of_rows(
                first, mask, rows, channels, sentences, sentence_stride, time_stride, HAS_MASK, ROWS
            )
            wanted = real[:, None] & within[None, :]
            value = tl.load(x + at + channel[None, :], mask=wanted, other=0.0).to(SUMS_IN)
            squares += value * value
            seen += real.to(tl.int32)
        tokens.store_sums(sums, channels, channel, within, squares)
        tokens.store_count(counts, seen)


@triton.jit
def _scale(
    x,
    y,
    weight,
    bias,
    statistic,
    batch_sums,
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
    eps: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SUMS_IN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    MANY: tl.constexpr,
):
    channel, within = tokens.channels_of_program(channels, WIDTH)
    psi2 = tokens.values_at(statistic, channel, within)
    if tl.load(step) < warmup_steps:
        programs = tl.num_programs(1)
        n = tokens.total_count(batch_counts, programs, MANY)
        squares = tokens.total(batch_sums, programs, channels, channel, within, MANY, WIDTH)
        psi2 = squares / tl.maximum(n, 1.0)
    scale = (tokens.values_at(weight, channel, within) / tl.sqrt(psi2 + eps)).to(SUMS_IN)
    shift = tokens.values_at(bias, channel, within).to(SUMS_IN)
    tokens.scale_rows(
        x,
        y,
        tl.zeros([WIDTH], SUMS_IN),
        scale,
        shift,
        sums,
        counts,
        channel,
        within,
        mask,
        rows,
        channels,
        sentences,
        sentence_stride,
        time_stride,
        HAS_MASK,
        SUMS_IN,
        ROWS,
        WIDTH,
        True,
    )


@triton.jit
def _finish_forward(
    sums,
    counts,
    running,
    step,
    rejected,
    warmup_steps,
    squares,
    taken,
    programs,
    channels,
    eps: tl.constexpr,
    pace: tl.constexpr,
    UPDATE: tl.constexpr,
    MANY: tl.constexpr,
    WIDTH: tl.constexpr,
):
    channel, within = tokens.channels_of_program(channels, WIDTH)
    by_batch = tl.load(step) < warmup_steps
    tokens_seen = tokens.total_count(counts, programs, MANY)
    total = tokens.total(sums, programs, channels, channel, within, MANY, WIDTH)
    psi2_batch = total / tl.maximum(tokens_seen, 1.0)
    used = tl.where(by_batch, psi2_batch, tokens.values_at(running, channel, within))
    tl.store(squares + channel, total, mask=within)
    tl.store(taken + channel, used, mask=within)
    tl.store(taken + channels + channel, psi2_batch / (used + eps), mask=within)
    tl.store(taken + 2 * channels, by_batch.to(tl.float64))
    tl.store(taken + 2 * channels + 1, tokens_seen)
    if UPDATE:
        finite = tokens.all_finite(psi2_batch, within, running)
        usable = finite & (tokens_seen > 0)
        tokens.average(running, channel, within, psi2_batch, pace, usable)
        tokens.count_one_if(step, usable)
        tokens.count_one_if(rejected, (tokens_seen > 0) & (finite == 0))


@triton.jit
def _sum_products(
    x,
    gradient,
    sums,
    taken,
    mask,
    rows,
    channels,
    sentences,
    sentence_stride,
    time_stride,
    HAS_MASK: tl.constexpr,
    SUMS_IN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    if tl.load(taken + 2 * channels) != 0:
        channel, within = tokens.channels_of_program(channels, WIDTH)
        tokens.sum_products(
            x,
            gradient,
            tl.zeros([WIDTH], SUMS_IN),
            sums,
            channel,
            within,
            mask,
            rows,
            channels,
            sentences,
            sentence_stride,
            time_stride,
            HAS_MASK,
            SUMS_IN,
            ROWS,
            WIDTH,
        )


@triton.jit
def _propagate(
    x,
    gradient,
    dx,
    weight,
    taken,
    nu,
    batch_sums,
    sums,
    mask,
    rows,
    channels,
    sentences,
    sentence_stride,
    time_stride,
    eps: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SUMS_IN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    MANY: tl.constexpr,
):
    channel, within = tokens.channels_of_program(channels, WIDTH)
    inverse = 1.0 / tl.sqrt(tokens.values_at(taken, channel, within) + eps)
    w = tokens.values_at(weight, channel, within)
    correction = tokens.values_at(nu, channel, within)
    if tl.load(taken + 2 * channels) != 0:
        programs = tl.num_programs(1)
        products = tokens.total(batch_sums, programs, channels, channel, within, MANY, WIDTH)
        n = tl.load(taken + 2 * channels + 1)
        correction = products * inverse * w / tl.maximum(n, 1.0)
    tokens.propagate(
        x,
        gradient,
        dx,
        tl.zeros([WIDTH], SUMS_IN),
        (w * inverse).to(SUMS_IN),
        (-correction * inverse * inverse).to(SUMS_IN),
        tl.zeros([WIDTH], SUMS_IN),
        sums,
        channel,
        within,
        mask,
        rows,
        channels,
        sentences,
        sentence_stride,
        time_stride,
        HAS_MASK,
        SUMS_IN,
        ROWS,
        WIDTH,
        True,
    )


@triton.jit
def _finish_backward(
    sums,
    weight,
    taken,
    nu,
    rejected,
    d_weight,
    d_bias,
    programs,
    channels,
    eps: tl.constexpr,
    pace: tl.constexpr,
    bound: tl.constexpr,
    UPDATE: tl.constexpr,
    MANY: tl.constexpr,
    WIDTH: tl.constexpr,
):
    channel, within = tokens.channels_of_program(channels, WIDTH)
    products = tokens.total(sums, programs, channels, channel, within, MANY, WIDTH)
    plain = tokens.total(
        sums + programs * channels, programs, channels, channel, within, MANY, WIDTH
    )
    dw = products / tl.sqrt(tokens.values_at(taken, channel, within) + eps)
    tl.store(d_weight + channel, dw, mask=within)
    tl.store(d_bias + channel, plain, mask=within)
    if UPDATE:
        tokens_seen = tl.load(taken + 2 * channels + 1)
        lam = dw * tokens.values_at(weight, channel, within) / tl.maximum(tokens_seen, 1.0)
        gamma = tokens.values_at(taken + channels, channel, within)
        paces = tl.full([WIDTH], pace, tl.float64)
        if bound:
            paces = tl.minimum(paces, 1.0 / gamma)
        before = tokens.values_at(nu, channel, within)
        after = before * (1.0 - paces * gamma) + paces * lam
        finite = tokens.all_finite(after, within, nu)
        after = tl.where(finite & (tokens_seen > 0), after, before)
        tl.store(nu + channel, after, mask=within)
        tokens.count_one_if(rejected, (tokens_seen > 0) & (finite == 0))


@torch.library.custom_op(
    "normexp::triton_power_forward", mutates_args=("running_psi2", "step", "rejected")
)
def _forward_op(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_psi2: Tensor,
    step: Tensor,
    rejected: Tensor,
    eps: float,
    alpha_fwd: float,
    warmup_steps: int,
    again: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_buffers(running_psi2, step, rejected)
    tiles = Tiles(x, mask)
    y = torch.empty_like(x)
    sums, counts = tiles.sums(2), tiles.counts(2)
    squares, taken = tiles.vector(tiles.sums_in), tiles.taken()
    with torch.cuda.device_of(x):
        _sum_squares[tiles.grid](x, sums[0], counts[0], step, warmup_steps, **tiles.arguments)
        _scale[tiles.grid](
            x,
            y,
            weight.contiguous(),
            bias.contiguous(),
            running_psi2,
            sums[0],
            counts[0],
            sums[1],
            counts[1],
            step,
            warmup_steps,
            eps=eps,
            MANY=tiles.many,
            **tiles.arguments,
        )
        _finish_forward[(1,)](
            sums[1],
            counts[1],
            running_psi2,
            step,
            rejected,
            warmup_steps,
            squares,
            taken,
            eps=eps,
            pace=1 - alpha_fwd,
            UPDATE=not again,
            **tiles.finishing,
        )
    return y, squares, taken


@_forward_op.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    channels = x.shape[-1]
    squares = x.new_empty(channels, dtype=sums_type(x))
    return torch.empty_like(x), squares, x.new_empty(2 * channels + 2, dtype=torch.float64)


@torch.library.custom_op("normexp::triton_power_again", mutates_args=())
def _again_op(
    x: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor, taken: Tensor, eps: float
) -> Tensor:
    tiles = Tiles(x, mask)
    y, sums, counts = torch.empty_like(x), tiles.sums(1), tiles.counts(1)
    with torch.cuda.device_of(x):
        _scale[tiles.grid](
            x,
            y,
            weight.contiguous(),
            bias.contiguous(),
            taken,
            *(sums[0], counts[0], sums[0], counts[0]),
            torch.zeros((), dtype=torch.long, device=x.device),
            0,  # no step is one of a warm-up: psi2 is used whatever it was
            eps=eps,
            MANY=tiles.many,
            **tiles.arguments,
        )
    return y


@_again_op.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("normexp::triton_power_backward", mutates_args=("nu", "rejected"))
def _backward_op(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    gradient: Tensor,
    taken: Tensor,
    nu: Tensor,
    rejected: Tensor,
    eps: float,
    alpha_bwd: float,
    bound_nu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_buffers(nu, rejected)
    given = x, mask, weight, gradient, taken, nu, rejected
    return _launch_backward(*given, eps, alpha_bwd, bound_nu, True)


@torch.library.custom_op("normexp::triton_power_v_backward", mutates_args=())
def _backward_v_op(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    gradient: Tensor,
    taken: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    # What takes the place of nu and of the counter has no part, but a kernel wants pointers.
    given = x, mask, weight, gradient, taken, taken, taken
    return _launch_backward(*given, eps, 0.0, False, False)


@_backward_op.register_fake
@_backward_v_op.register_fake
def _(x: Tensor, mask: Tensor | None, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def _launch_backward(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    gradient: Tensor,
    taken: Tensor,
    nu: Tensor,
    rejected: Tensor,
    eps: float,
    alpha_bwd: float,
    bound_nu: bool,
    update: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tiles = Tiles(x, mask)
    gradient, weight = gradient.contiguous(), weight.contiguous()
    dx, sums = torch.empty_like(x), tiles.sums(2, 2)
    d_weight, d_bias = tiles.vector(tiles.sums_in), tiles.vector(tiles.sums_in)
    with torch.cuda.device_of(x):
        _sum_products[tiles.grid](x, gradient, sums[0], taken, **tiles.arguments)
        _propagate[tiles.grid](
            *(x, gradient, dx, weight, taken, nu, sums[0], sums[1]),
            eps=eps,
            MANY=tiles.many,
            **tiles.arguments,
        )
        _finish_backward[(1,)](
            *(sums[1], weight, taken, nu, rejected, d_weight, d_bias),
            eps=eps,
            pace=1 - alpha_bwd,
            bound=bound_nu,
            UPDATE=update,
            **tiles.finishing,
        )
    return dx, d_weight.to(weight.dtype), d_bias.to(weight.dtype)


class _Power(torch.autograd.Function):
    """x -> y and what the forward took from state and batch; only y where it repeats another."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mask: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        running_psi2: Tensor,
        nu: Tensor,
        step: Tensor,
        rejected: Tensor,
        recalled: Tensor | None,
        eps: float,
        alpha_fwd: float,
        alpha_bwd: float,
        warmup_steps: int,
        bound_nu: bool,
    ) -> Any:
        if recalled is not None:
            y, taken = _again_op(x, mask, weight, bias, recalled, eps), recalled
        else:
            state = running_psi2, step, rejected
            options = eps, alpha_fwd, warmup_steps, False
            y, squares, taken = _forward_op(x, mask, weight, bias, *state, *options)
        ctx.save_for_backward(x, mask, weight, taken)
        # Not among the saved ones, because it may have moved on before backward reads it.
        ctx.nu, ctx.rejected = nu, rejected
        ctx.options = eps, alpha_bwd, bound_nu
        if recalled is not None:
            return y
        ctx.mark_non_differentiable(squares, taken)
        return y, squares, taken

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, mask, weight, taken = ctx.saved_tensors
        dx, d_weight, d_bias = _backward_op(
            x, mask, weight, gradient, taken, ctx.nu, ctx.rejected, *ctx.options
        )
        return dx, None, d_weight, d_bias, *(None,) * 10


class _PowerV(torch.autograd.Function):
    """x -> y."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mask: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        running_psi2: Tensor,
        step: Tensor,
        rejected: Tensor,
        again: bool,
        eps: float,
        alpha: float,
    ) -> Tensor:
        state = running_psi2, step, rejected
        y, _, taken = _forward_op(x, mask, weight, bias, *state, eps, alpha, ALWAYS, again)
        ctx.save_for_backward(x, mask, weight, taken)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, weight, taken = ctx.saved_tensors
        if torch.is_grad_enabled():  # this gradient is to be differentiated in turn
            values, real = flatten_tokens(x, mask, x.shape[-1])
            values = only_real(values, real)
            psi2 = real_mean(values.square(), real)
            y = values * (torch.rsqrt(psi2 + ctx.eps) * weight)
            upstream = only_real(gradient.reshape(y.shape).to(y.dtype), real)
            dx, d_weight = torch.autograd.grad(y, (x, weight), upstream, create_graph=True)
            d_bias = upstream.sum(0).to(weight.dtype)
        else:
            dx, d_weight, d_bias = _backward_v_op(x, mask, weight, gradient, taken, ctx.eps)
        return dx, None, d_weight, d_bias, *(None,) * 6


def power(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_psi2: Tensor,
    nu: Tensor,
    step: Tensor,
    rejected: Tensor,
    recalled: Tensor | None,
    eps: float,
    alpha_fwd: float,
    alpha_bwd: float,
    warmup_steps: int,
    bound_nu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One iteration of PN: x (T, B, C) or (N, C), contiguous, mask (B, T) or (N,) or None -> y.

    Besides y like x, the sums of x^2 (C,) by which a forward that repeats this one will find it,
    and what this one took from the state, (2 C + 2,): psi2, Gamma, whether in the warm-up, N. That
    is then given as `recalled`, and nothing changes. running_psi2 (C,), step and rejected change in
    the forward, nu (C,) and rejected in backward.

    Raises ValueError where x or what is to change is not contiguous.
    """
    state, options = (running_psi2, nu, step, rejected), (eps, alpha_fwd, alpha_bwd)
    result = _Power.apply(x, mask, weight, bias, *state, recalled, *options, warmup_steps, bound_nu)
    return result if recalled is None else (result, recalled.new_empty(0), recalled)


def power_v(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_psi2: Tensor,
    step: Tensor,
    rejected: Tensor,
    again: bool,
    eps: float,
    alpha: float,
) -> Tensor:
    """One step of PN-V: x (T, B, C) or (N, C), contiguous, mask (B, T) or (N,) or None -> y.

    running_psi2 (C,), step and rejected change, unless this repeats `again` another forward.

    Raises ValueError where x or what is to change is not contiguous.
    """
    state = running_psi2, step, rejected
    return _PowerV.apply(x, mask, weight, bias, *state, again, eps, alpha)
