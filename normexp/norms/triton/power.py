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

from normexp.norms.masking import flatten_tokens, only_real, real_mean
from normexp.norms.triton import tokens
from normexp.norms.triton.tiles import ALWAYS, Tiles, check_buffers, sums_type


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
    psi2,
    gamma,
    exact,
    n,
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
    tl.store(psi2 + channel, used, mask=within)
    tl.store(gamma + channel, psi2_batch / (used + eps), mask=within)
    tl.store(exact, by_batch.to(tl.uint8))
    tl.store(n, tokens_seen)
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
    exact,
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
    if tl.load(exact) != 0:
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
    psi2,
    nu,
    exact,
    n,
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
    inverse = 1.0 / tl.sqrt(tokens.values_at(psi2, channel, within) + eps)
    w = tokens.values_at(weight, channel, within)
    correction = tokens.values_at(nu, channel, within)
    if tl.load(exact) != 0:
        programs = tl.num_programs(1)
        products = tokens.total(batch_sums, programs, channels, channel, within, MANY, WIDTH)
        correction = products * inverse * w / tl.maximum(tl.load(n), 1.0)
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
    psi2,
    gamma,
    n,
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
    dw = products / tl.sqrt(tokens.values_at(psi2, channel, within) + eps)
    tl.store(d_weight + channel, dw, mask=within)
    tl.store(d_bias + channel, plain, mask=within)
    if UPDATE:
        tokens_seen = tl.load(n)
        lam = dw * tokens.values_at(weight, channel, within) / tl.maximum(tokens_seen, 1.0)
        of_batch = tokens.values_at(gamma, channel, within)
        paces = tl.full([WIDTH], pace, tl.float64)
        if bound:
            paces = tl.minimum(paces, 1.0 / of_batch)
        before = tokens.values_at(nu, channel, within)
        after = before * (1.0 - paces * of_batch) + paces * lam
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_buffers(running_psi2, step, rejected)
    tiles = Tiles(x, mask)
    y = torch.empty_like(x)
    sums, counts = tiles.sums(2), tiles.counts(2)
    squares, psi2 = tiles.vector(tiles.sums_in), tiles.vector(torch.float64)
    gamma, exact = tiles.vector(torch.float64), tiles.scalar(torch.bool)
    n = tiles.scalar(torch.float64)
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
            psi2,
            gamma,
            exact.view(torch.uint8),
            n,
            eps=eps,
            pace=1 - alpha_fwd,
            UPDATE=not again,
            **tiles.finishing,
        )
    return y, squares, psi2, gamma, exact, n


@_forward_op.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    y, channels = torch.empty_like(x), x.shape[-1]
    squares = x.new_empty(channels, dtype=sums_type(x))
    psi2, gamma = (x.new_empty(channels, dtype=torch.float64) for _ in range(2))
    return (
        *(y, squares, psi2, gamma),
        *(x.new_empty((), dtype=torch.bool), x.new_empty((), dtype=torch.float64)),
    )


@torch.library.custom_op("normexp::triton_power_again", mutates_args=())
def _again_op(
    x: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor, psi2: Tensor, eps: float
) -> Tensor:
    tiles = Tiles(x, mask)
    y, sums, counts = torch.empty_like(x), tiles.sums(1), tiles.counts(1)
    with torch.cuda.device_of(x):
        _scale[tiles.grid](
            x,
            y,
            weight.contiguous(),
            bias.contiguous(),
            psi2,
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
    psi2: Tensor,
    gamma: Tensor,
    exact: Tensor,
    n: Tensor,
    nu: Tensor,
    rejected: Tensor,
    eps: float,
    alpha_bwd: float,
    bound_nu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_buffers(nu, rejected)
    taken = (psi2, gamma, exact, n, nu, rejected)
    return _launch_backward(x, mask, weight, gradient, *taken, eps, alpha_bwd, bound_nu, True)


@torch.library.custom_op("normexp::triton_power_v_backward", mutates_args=())
def _backward_v_op(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    gradient: Tensor,
    psi2: Tensor,
    exact: Tensor,
    n: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    # Nothing is read of what takes the place of gamma and nu, but a kernel wants pointers.
    taken = (psi2, psi2, exact, n, psi2, n)
    return _launch_backward(x, mask, weight, gradient, *taken, eps, 0.0, False, False)


@_backward_op.register_fake
@_backward_v_op.register_fake
def _(x: Tensor, mask: Tensor | None, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def _launch_backward(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    gradient: Tensor,
    psi2: Tensor,
    gamma: Tensor,
    exact: Tensor,
    n: Tensor,
    nu: Tensor,
    rejected: Tensor,
    eps: float,
    alpha_bwd: float,
    bound_nu: bool,
    update: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tiles = Tiles(x, mask)
    gradient, weight, exact = gradient.contiguous(), weight.contiguous(), exact.view(torch.uint8)
    dx, sums = torch.empty_like(x), tiles.sums(2, 2)
    d_weight, d_bias = tiles.vector(tiles.sums_in), tiles.vector(tiles.sums_in)
    with torch.cuda.device_of(x):
        _sum_products[tiles.grid](x, gradient, sums[0], exact, **tiles.arguments)
        _propagate[tiles.grid](
            *(x, gradient, dx, weight, psi2, nu, exact, n, sums[0], sums[1]),
            eps=eps,
            MANY=tiles.many,
            **tiles.arguments,
        )
        _finish_backward[(1,)](
            *(sums[1], weight, psi2, gamma, n, nu, rejected, d_weight, d_bias),
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
        recalled: tuple[Tensor, ...],
        eps: float,
        alpha_fwd: float,
        alpha_bwd: float,
        warmup_steps: int,
        bound_nu: bool,
    ) -> Any:
        if recalled:
            y, taken = _again_op(x, mask, weight, bias, recalled[0], eps), recalled
        else:
            state = running_psi2, step, rejected
            options = eps, alpha_fwd, warmup_steps, False
            y, squares, *taken = _forward_op(x, mask, weight, bias, *state, *options)
        ctx.save_for_backward(x, mask, weight, *taken)
        # Not among the saved ones, because it may have moved on before backward reads it.
        ctx.nu, ctx.rejected = nu, rejected
        ctx.options = eps, alpha_bwd, bound_nu
        if recalled:
            return y
        ctx.mark_non_differentiable(squares, *taken)
        return y, squares, *taken

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, mask, weight, *taken = ctx.saved_tensors
        dx, d_weight, d_bias = _backward_op(
            x, mask, weight, gradient, *taken, ctx.nu, ctx.rejected, *ctx.options
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
        y, _, psi2, _, exact, n = _forward_op(
            x, mask, weight, bias, *state, eps, alpha, ALWAYS, again
        )
        ctx.save_for_backward(x, mask, weight, psi2, exact, n)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, weight, *taken = ctx.saved_tensors
        if torch.is_grad_enabled():  # this gradient is to be differentiated in turn
            values, real = flatten_tokens(x, mask, x.shape[-1])
            values = only_real(values, real)
            psi2 = real_mean(values.square(), real)
            y = values * (torch.rsqrt(psi2 + ctx.eps) * weight)
            upstream = only_real(gradient.reshape(y.shape).to(y.dtype), real)
            dx, d_weight = torch.autograd.grad(y, (x, weight), upstream, create_graph=True)
            d_bias = upstream.sum(0).to(weight.dtype)
        else:
            dx, d_weight, d_bias = _backward_v_op(x, mask, weight, gradient, *taken, ctx.eps)
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
    recalled: tuple[Tensor, ...],
    eps: float,
    alpha_fwd: float,
    alpha_bwd: float,
    warmup_steps: int,
    bound_nu: bool,
) -> tuple[Tensor, ...]:
    """One iteration of PN: x (T, B, C) or (N, C), contiguous, mask (B, T) or (N,) or None -> y.

    Besides y like x, what the forward took: squares (C,), psi2 (C,), Gamma (C,), whether in the
    warm-up (bool), N; all on the device. A forward that repeats another gets the last four of
    these again as `recalled`, which is empty otherwise, and changes nothing. running_psi2 (C,),
    step, rejected change in the forward, nu (C,) and rejected in backward.

    Raises ValueError where x or what is to change is not contiguous.
    """
    state, options = (running_psi2, nu, step, rejected), (eps, alpha_fwd, alpha_bwd)
    result = _Power.apply(x, mask, weight, bias, *state, recalled, *options, warmup_steps, bound_nu)
    return (result, recalled[0].new_empty(0), *recalled) if recalled else result


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
