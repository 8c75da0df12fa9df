"""PN (Algorithm 2) and PN-V: one step of training, forward and backward. Imports triton.

Equations and rules of the state: normexp/norms/power.py, power_v.py, running_norm.py. PN-V is PN
in a warm-up that never ends, without nu. Statistics of several ranks are left to plain torch; the
sums over tokens and the kernels that use them are separate, so that a sum over ranks could be taken
between them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from normexp.norms.core.masking import flatten_tokens
from normexp.norms.core.second_order import power_v_gradients
from normexp.norms.kernels.triton import tokens
from normexp.norms.kernels.triton.tiles import ALWAYS, Tiles, check_buffers, sums_type


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
    HAS_MASK: tl.constexpr,
    SUMS_IN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """partial_sums (P, C) of x^2 and counts (P,) over the real tokens, if in the warm-up."""
    if tl.load(step) < warmup_steps:
        channel, within = tokens.channels_of_program(channels, WIDTH)
        sum_sq = tl.zeros([ROWS, WIDTH], SUMS_IN)
        seen = tl.zeros([ROWS], tl.int32)
        stride = tl.num_programs(1) * ROWS
        for first in range(tl.program_id(1) * ROWS, rows, stride):
            at, _, token_mask = tokens.tile_of_rows(
                first, mask, rows, channels, sentences, sentence_stride, time_stride, HAS_MASK, ROWS
            )
            wanted = token_mask[:, None] & within[None, :]
            value = tl.load(x + at + channel[None, :], mask=wanted, other=0.0).to(SUMS_IN)
            sum_sq += value * value
            seen += token_mask.to(tl.int32)
        tokens.store_sums(partial_sums, channels, channel, within, sum_sq)
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
    eps: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SUMS_IN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    MANY: tl.constexpr,
):
    """y = w x / sqrt(psi2 + eps) + b, psi2 the batch's in the warm-up; partial sums of x^2."""
    channel, within = tokens.channels_of_program(channels, WIDTH)
    psi2 = tokens.values_at(statistic, channel, within)
    if tl.load(step) < warmup_steps:
        programs = tl.num_programs(1)
        n = tokens.total_count(batch_counts, programs, MANY)
        sum_sq = tokens.total(batch_sums, programs, channels, channel, within, MANY, WIDTH)
        psi2 = sum_sq / tl.maximum(n, 1.0)
    scale = (tokens.values_at(weight, channel, within) / tl.sqrt(psi2 + eps)).to(SUMS_IN)
    shift = tokens.values_at(bias, channel, within).to(SUMS_IN)
    tokens.scale_rows(
        x,
        y,
        tl.zeros([WIDTH], SUMS_IN),
        scale,
        shift,
        partial_sums,
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
    partial_sums,
    counts,
    running,
    step,
    num_rejected,
    warmup_steps,
    sum_sq,
    saved,
    programs,
    channels,
    eps: tl.constexpr,
    update_rate: tl.constexpr,
    UPDATE: tl.constexpr,
    MANY: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """From the partial sums: psi2_B, what is saved for backward, the new psi2 and step."""
    channel, within = tokens.channels_of_program(channels, WIDTH)
    by_batch = tl.load(step) < warmup_steps
    tokens_seen = tokens.total_count(counts, programs, MANY)
    total = tokens.total(partial_sums, programs, channels, channel, within, MANY, WIDTH)
    psi2_batch = total / tl.maximum(tokens_seen, 1.0)
    used = tl.where(by_batch, psi2_batch, tokens.values_at(running, channel, within))
    tl.store(sum_sq + channel, total, mask=within)
    tl.store(saved + channel, used, mask=within)
    tl.store(saved + channels + channel, psi2_batch / (used + eps), mask=within)
    tl.store(saved + 2 * channels, by_batch.to(tl.float64))
    tl.store(saved + 2 * channels + 1, tokens_seen)
    if UPDATE:
        finite = tokens.all_finite(psi2_batch, within, running)
        usable = finite & (tokens_seen > 0)
        tokens.average(running, channel, within, psi2_batch, update_rate, usable)
        tokens.count_one_if(step, usable)
        tokens.count_one_if(num_rejected, (tokens_seen > 0) & (finite == 0))


@triton.jit
def _sum_products(
    x,
    gradient,
    partial_sums,
    saved,
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
    """partial_sums (2, P, C) of dL/dy x and of dL/dy, if in the warm-up."""
    if tl.load(saved + 2 * channels) != 0:
        channel, within = tokens.channels_of_program(channels, WIDTH)
        tokens.sum_products(
            x,
            gradient,
            tl.zeros([WIDTH], SUMS_IN),
            partial_sums,
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
    saved,
    nu,
    batch_sums,
    partial_sums,
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
    """dx = (g - correction x_hat) / sqrt(psi2 + eps); partial sums of dL/dy x and dL/dy."""
    channel, within = tokens.channels_of_program(channels, WIDTH)
    inverse = 1.0 / tl.sqrt(tokens.values_at(saved, channel, within) + eps)
    w = tokens.values_at(weight, channel, within)
    correction = tokens.values_at(nu, channel, within)
    if tl.load(saved + 2 * channels) != 0:
        programs = tl.num_programs(1)
        products = tokens.total(batch_sums, programs, channels, channel, within, MANY, WIDTH)
        n = tl.load(saved + 2 * channels + 1)
        correction = products * inverse * w / tl.maximum(n, 1.0)
    tokens.propagate(
        x,
        gradient,
        dx,
        tl.zeros([WIDTH], SUMS_IN),
        (w * inverse).to(SUMS_IN),
        (-correction * inverse * inverse).to(SUMS_IN),
        tl.zeros([WIDTH], SUMS_IN),
        partial_sums,
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
    partial_sums,
    weight,
    saved,
    nu,
    num_rejected,
    d_weight,
    d_bias,
    programs,
    channels,
    eps: tl.constexpr,
    update_rate: tl.constexpr,
    bound: tl.constexpr,
    UPDATE: tl.constexpr,
    MANY: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """From the partial sums: d_weight, d_bias (C,) and the new nu."""
    channel, within = tokens.channels_of_program(channels, WIDTH)
    products = tokens.total(partial_sums, programs, channels, channel, within, MANY, WIDTH)
    plain = tokens.total(
        partial_sums + programs * channels, programs, channels, channel, within, MANY, WIDTH
    )
    dw = products / tl.sqrt(tokens.values_at(saved, channel, within) + eps)
    tl.store(d_weight + channel, dw, mask=within)
    tl.store(d_bias + channel, plain, mask=within)
    if UPDATE:
        tokens_seen = tl.load(saved + 2 * channels + 1)
        lambda_ = dw * tokens.values_at(weight, channel, within) / tl.maximum(tokens_seen, 1.0)
        gamma = tokens.values_at(saved + channels, channel, within)
        update_rates = tl.full([WIDTH], update_rate, tl.float64)
        if bound:
            update_rates = tl.minimum(update_rates, 1.0 / gamma)
        before = tokens.values_at(nu, channel, within)
        after = before * (1.0 - update_rates * gamma) + update_rates * lambda_
        finite = tokens.all_finite(after, within, nu)
        after = tl.where(finite & (tokens_seen > 0), after, before)
        tl.store(nu + channel, after, mask=within)
        tokens.count_one_if(num_rejected, (tokens_seen > 0) & (finite == 0))


@torch.library.custom_op(
    "normexp::triton_power_forward", mutates_args=("running_psi2", "step", "num_rejected")
)
def _forward_op(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_psi2: Tensor,
    step: Tensor,
    num_rejected: Tensor,
    eps: float,
    alpha_fwd: float,
    warmup_steps: int,
    is_replay: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_buffers(running_psi2, step, num_rejected)
    tiles = Tiles(x, mask)
    y = torch.empty_like(x)
    partial_sums, counts = tiles.partial_sums(2), tiles.counts(2)
    sum_sq, saved = tiles.vector(tiles.sums_in), tiles.saved()
    with torch.cuda.device_of(x):
        _sum_sq[tiles.grid](x, partial_sums[0], counts[0], step, warmup_steps, **tiles.arguments)
        _scale[tiles.grid](
            x,
            y,
            weight.contiguous(),
            bias.contiguous(),
            running_psi2,
            partial_sums[0],
            counts[0],
            partial_sums[1],
            counts[1],
            step,
            warmup_steps,
            eps=eps,
            MANY=tiles.many,
            **tiles.arguments,
        )
        _finish_forward[(1,)](
            partial_sums[1],
            counts[1],
            running_psi2,
            step,
            num_rejected,
            warmup_steps,
            sum_sq,
            saved,
            eps=eps,
            update_rate=1 - alpha_fwd,
            UPDATE=not is_replay,
            **tiles.finishing,
        )
    return y, sum_sq, saved


@_forward_op.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    channels = x.shape[-1]
    sum_sq = x.new_empty(channels, dtype=sums_type(x))
    return torch.empty_like(x), sum_sq, x.new_empty(2 * channels + 2, dtype=torch.float64)


@torch.library.custom_op("normexp::triton_power_replay", mutates_args=())
def _replay_op(
    x: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor, saved: Tensor, eps: float
) -> Tensor:
    tiles = Tiles(x, mask)
    y, partial_sums, counts = torch.empty_like(x), tiles.partial_sums(1), tiles.counts(1)
    with torch.cuda.device_of(x):
        _scale[tiles.grid](
            x,
            y,
            weight.contiguous(),
            bias.contiguous(),
            saved,
            *(partial_sums[0], counts[0], partial_sums[0], counts[0]),
            torch.zeros((), dtype=torch.long, device=x.device),
            0,  # no step is one of a warm-up: psi2 is used whatever it was
            eps=eps,
            MANY=tiles.many,
            **tiles.arguments,
        )
    return y


@_replay_op.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("normexp::triton_power_backward", mutates_args=("nu", "num_rejected"))
def _backward_op(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    gradient: Tensor,
    saved: Tensor,
    nu: Tensor,
    num_rejected: Tensor,
    eps: float,
    alpha_bwd: float,
    bound_nu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_buffers(nu, num_rejected)
    given = x, mask, weight, gradient, saved, nu, num_rejected
    return _launch_backward(*given, eps, alpha_bwd, bound_nu, True)


@torch.library.custom_op("normexp::triton_power_v_backward", mutates_args=())
def _backward_v_op(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    gradient: Tensor,
    saved: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    # nu and the counter are neither read nor written here, but a kernel needs pointers.
    given = x, mask, weight, gradient, saved, saved, saved
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
    saved: Tensor,
    nu: Tensor,
    num_rejected: Tensor,
    eps: float,
    alpha_bwd: float,
    bound_nu: bool,
    update: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tiles = Tiles(x, mask)
    gradient, weight = gradient.contiguous(), weight.contiguous()
    dx, partial_sums = torch.empty_like(x), tiles.partial_sums(2, 2)
    d_weight, d_bias = tiles.vector(tiles.sums_in), tiles.vector(tiles.sums_in)
    with torch.cuda.device_of(x):
        _sum_products[tiles.grid](x, gradient, partial_sums[0], saved, **tiles.arguments)
        _propagate[tiles.grid](
            *(x, gradient, dx, weight, saved, nu, partial_sums[0], partial_sums[1]),
            eps=eps,
            MANY=tiles.many,
            **tiles.arguments,
        )
        _finish_backward[(1,)](
            *(partial_sums[1], weight, saved, nu, num_rejected, d_weight, d_bias),
            eps=eps,
            update_rate=1 - alpha_bwd,
            bound=bound_nu,
            UPDATE=update,
            **tiles.finishing,
        )
    return dx, d_weight.to(weight.dtype), d_bias.to(weight.dtype)


class _PowerFunction(torch.autograd.Function):
    """PN: x -> y, sums of x^2 and what the forward saved; only y in a replay."""

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
        num_rejected: Tensor,
        replayed: Tensor | None,
        eps: float,
        alpha_fwd: float,
        alpha_bwd: float,
        warmup_steps: int,
        bound_nu: bool,
    ) -> Any:
        if replayed is not None:
            y, saved = _replay_op(x, mask, weight, bias, replayed, eps), replayed
        else:
            state = running_psi2, step, num_rejected
            options = eps, alpha_fwd, warmup_steps, False
            y, sum_sq, saved = _forward_op(x, mask, weight, bias, *state, *options)
        ctx.save_for_backward(x, mask, weight, saved)
        # Not among the saved ones, because it may have moved on before backward reads it.
        ctx.nu, ctx.num_rejected = nu, num_rejected
        ctx.options = eps, alpha_bwd, bound_nu
        if replayed is not None:
            return y
        ctx.mark_non_differentiable(sum_sq, saved)
        return y, sum_sq, saved

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, mask, weight, saved = ctx.saved_tensors
        dx, d_weight, d_bias = _backward_op(
            x, mask, weight, gradient, saved, ctx.nu, ctx.num_rejected, *ctx.options
        )
        return dx, None, d_weight, d_bias, *(None,) * 10


class _PowerVFunction(torch.autograd.Function):
    """PN-V: x -> y."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mask: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        running_psi2: Tensor,
        step: Tensor,
        num_rejected: Tensor,
        is_replay: bool,
        eps: float,
        alpha: float,
    ) -> Tensor:
        state = running_psi2, step, num_rejected
        y, _, saved = _forward_op(x, mask, weight, bias, *state, eps, alpha, ALWAYS, is_replay)
        ctx.save_for_backward(x, mask, weight, saved)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, weight, saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # this gradient is to be differentiated in turn
            dx, d_weight, d_bias = power_v_gradients(
                *(x, weight, gradient, *flatten_tokens(x, mask, x.shape[-1]), ctx.eps),
                mean=lambda sum_sq, n: sum_sq / n.clamp(min=1),
            )
        else:
            dx, d_weight, d_bias = _backward_v_op(x, mask, weight, gradient, saved, ctx.eps)
        return dx, None, d_weight, d_bias, *(None,) * 6


def power(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_psi2: Tensor,
    nu: Tensor,
    step: Tensor,
    num_rejected: Tensor,
    replayed: Tensor | None,
    eps: float,
    alpha_fwd: float,
    alpha_bwd: float,
    warmup_steps: int,
    bound_nu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One iteration of PN: x (T, B, C) or (N, C), contiguous, mask (B, T) or (N,) or None -> y.

    Returns y like x; the sums of x^2 (C,), by which a forward that repeats this one is recognised;
    and what this one saved, (2 C + 2,): psi2, Gamma, whether in the warm-up, N. The repeated
    forward passes the latter as `replayed`, and changes nothing. Otherwise running_psi2 (C,), step
    and num_rejected change in the forward, nu (C,) and num_rejected in backward.

    Raises ValueError where x or a buffer that changes is not contiguous.
    """
    state, options = (running_psi2, nu, step, num_rejected), (eps, alpha_fwd, alpha_bwd)
    result = _PowerFunction.apply(
        x, mask, weight, bias, *state, replayed, *options, warmup_steps, bound_nu
    )
    return result if replayed is None else (result, replayed.new_empty(0), replayed)


def power_v(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_psi2: Tensor,
    step: Tensor,
    num_rejected: Tensor,
    is_replay: bool,
    eps: float,
    alpha: float,
) -> Tensor:
    """One step of PN-V: x (T, B, C) or (N, C), contiguous, mask (B, T) or (N,) or None -> y.

    running_psi2 (C,), step and num_rejected change, unless `is_replay`: then this repeats another
    forward.

    Raises ValueError where x or a buffer that changes is not contiguous.
    """
    state = running_psi2, step, num_rejected
    return _PowerVFunction.apply(x, mask, weight, bias, *state, is_replay, eps, alpha)
