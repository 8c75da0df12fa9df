"""BN over real tokens, also regularized: one step of training, forward and backward.

Equations and rules of the state: normexp/norms/batch.py, regularized_batch.py, running_norm.py.
Imports triton. Statistics of several ranks are left to plain torch.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from normexp.norms.core.masking import flatten_tokens
from normexp.norms.core.second_order import batch_gradients
from normexp.norms.kernels.triton import tokens
from normexp.norms.kernels.triton.tiles import Tiles, check_buffers, sums_type


@triton.jit
def _inverse_std(var, eps: tl.constexpr, regularized: tl.constexpr):
    """1 / sqrt(var + eps), regularized: 1 / sqrt(max(var, eps))."""
    increased = var + eps
    if regularized:
        # Not tl.maximum, which would hide a variance that is NaN.
        increased = tl.where(var < eps, eps, var)
    return 1.0 / tl.sqrt(increased)


@triton.jit
def _moments(
    x,
    means,
    m2s,
    counts,
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
    """Per program: mean (P, C), sum of squared distances from it m2 (P, C), count (P,)."""
    # Token by token in each of ROWS lanes (Welford), then over the lanes (Chan, Golub, LeVeque
    # 1979): a difference of sums of squares would lose its digits where the mean is large.
    channel, within = tokens.channels_of_program(channels, WIDTH)
    mean = tl.zeros([ROWS, WIDTH], SUMS_IN)
    m2 = tl.zeros([ROWS, WIDTH], SUMS_IN)
    seen = tl.zeros([ROWS], tl.int32)
    stride = tl.num_programs(1) * ROWS
    for first in range(tl.program_id(1) * ROWS, rows, stride):
        at, _, token_mask = tokens.tile_of_rows(
            first, mask, rows, channels, sentences, sentence_stride, time_stride, HAS_MASK, ROWS
        )
        wanted = token_mask[:, None] & within[None, :]
        value = tl.load(x + at + channel[None, :], mask=wanted, other=0.0).to(SUMS_IN)
        seen += token_mask.to(tl.int32)
        share = (1.0 / tl.maximum(seen, 1).to(SUMS_IN))[:, None]
        apart = tl.where(wanted, value - mean, 0.0)
        mean += apart * share
        m2 += tl.where(wanted, apart * (value - mean), 0.0)
    of_lane = seen.to(SUMS_IN)[:, None]
    count = tl.sum(seen, axis=0)
    mean_of_all = tl.sum(mean * of_lane, axis=0) / tl.maximum(count, 1).to(SUMS_IN)
    apart = mean - mean_of_all[None, :]
    m2 += of_lane * apart * apart
    tl.store(means + tl.program_id(1) * channels + channel, mean_of_all, mask=within)
    tokens.store_sums(m2s, channels, channel, within, m2)
    tokens.store_count(counts, seen)


@triton.jit
def _finish_forward(
    means,
    m2s,
    counts,
    running_mean,
    running_var,
    step,
    num_rejected,
    mean,
    var,
    n,
    programs,
    channels,
    momentum: tl.constexpr,
    regularized: tl.constexpr,
    UPDATE: tl.constexpr,
    MANY: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Combine the programs' moments: mean, var (C,), n, new running values and step."""
    channel, within = tokens.channels_of_program(channels, WIDTH)
    seen = tokens.total_count(counts, programs, MANY)
    weighted = tl.zeros([MANY, WIDTH], tl.float64)
    for first in range(0, programs, MANY):
        program = first + tl.arange(0, MANY)
        exists = (program < programs)[:, None] & within[None, :]
        at = program[:, None] * channels + channel[None, :]
        count = tl.load(counts + program, mask=program < programs, other=0).to(tl.float64)
        part = tl.load(means + at, mask=exists, other=0.0).to(tl.float64)
        weighted += count[:, None] * part
    total_mean = tl.sum(weighted, axis=0) / tl.maximum(seen, 1.0)
    sum_sq = tl.zeros([MANY, WIDTH], tl.float64)
    for first in range(0, programs, MANY):
        program = first + tl.arange(0, MANY)
        exists = (program < programs)[:, None] & within[None, :]
        at = program[:, None] * channels + channel[None, :]
        count = tl.load(counts + program, mask=program < programs, other=0).to(tl.float64)
        apart = tl.load(means + at, mask=exists, other=0.0).to(tl.float64) - total_mean[None, :]
        sum_sq += count[:, None] * apart * apart
        sum_sq += tl.load(m2s + at, mask=exists, other=0.0).to(tl.float64)
    total_var = tl.sum(sum_sq, axis=0) / tl.maximum(seen, 1.0)
    tl.store(mean + channel, total_mean, mask=within)
    tl.store(var + channel, total_var, mask=within)
    tl.store(n, seen)
    if UPDATE:
        finite_mean = tokens.all_finite(total_mean, within, running_mean)
        finite = finite_mean & tokens.all_finite(total_var, within, running_mean)
        usable = finite & (seen > 0)
        to_average = total_var
        if not regularized:
            to_average = total_var * (seen / tl.maximum(seen - 1.0, 1.0))
        tokens.average(running_mean, channel, within, total_mean, momentum, usable)
        tokens.average(running_var, channel, within, to_average, momentum, usable)
        tokens.count_one_if(step, usable)
        tokens.count_one_if(num_rejected, (seen > 0) & (finite == 0))


@triton.jit
def _scale(
    x,
    y,
    weight,
    bias,
    mean,
    var,
    mask,
    rows,
    channels,
    sentences,
    sentence_stride,
    time_stride,
    eps: tl.constexpr,
    regularized: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SUMS_IN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """y = w (x - mean) / sqrt(var + eps) + b, 0 at padding."""
    channel, within = tokens.channels_of_program(channels, WIDTH)
    inverse = _inverse_std(tokens.values_at(var, channel, within), eps, regularized)
    tokens.scale_rows(
        x,
        y,
        tokens.values_at(mean, channel, within).to(SUMS_IN),
        (inverse * tokens.values_at(weight, channel, within)).to(SUMS_IN),
        tokens.values_at(bias, channel, within).to(SUMS_IN),
        x,
        x,
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
        False,
    )


@triton.jit
def _sum_products(
    x,
    gradient,
    mean,
    partial_sums,
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
    """partial_sums (2, P, C) of dL/dy (x - mean) and of dL/dy."""
    channel, within = tokens.channels_of_program(channels, WIDTH)
    tokens.sum_products(
        x,
        gradient,
        tokens.values_at(mean, channel, within).to(SUMS_IN),
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
    mean,
    var,
    n,
    d_mean,
    d_var,
    partial_sums,
    d_weight,
    d_bias,
    mask,
    rows,
    channels,
    sentences,
    sentence_stride,
    time_stride,
    eps: tl.constexpr,
    regularized: tl.constexpr,
    HAS_D_MEAN: tl.constexpr,
    HAS_D_VAR: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SUMS_IN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    MANY: tl.constexpr,
):
    """From the partial sums: d_weight, d_bias (C,), and dx by the exact gradient."""
    channel, within = tokens.channels_of_program(channels, WIDTH)
    programs = tl.num_programs(1)
    products = tokens.total(partial_sums, programs, channels, channel, within, MANY, WIDTH)
    plain = tokens.total(
        partial_sums + programs * channels, programs, channels, channel, within, MANY, WIDTH
    )
    w = tokens.values_at(weight, channel, within)
    of_batch = tokens.values_at(var, channel, within)
    inverse = _inverse_std(of_batch, eps, regularized)
    inverse_slope = -0.5 * inverse * inverse * inverse
    if regularized:
        inverse_slope = tl.where(of_batch < eps, 0.0, inverse_slope)
    to_var = products * w * inverse_slope
    if HAS_D_VAR:
        to_var += tokens.values_at(d_var, channel, within)
    to_mean = -plain * w * inverse
    if HAS_D_MEAN:
        to_mean += tokens.values_at(d_mean, channel, within)
    seen = tl.maximum(tl.load(n).to(tl.float64), 1.0)
    if tl.program_id(1) == 0:
        tl.store(d_weight + channel, products * inverse, mask=within)
        tl.store(d_bias + channel, plain, mask=within)
    tokens.propagate(
        x,
        gradient,
        dx,
        tokens.values_at(mean, channel, within).to(SUMS_IN),
        (w * inverse).to(SUMS_IN),
        (2.0 * to_var / seen).to(SUMS_IN),
        (to_mean / seen).to(SUMS_IN),
        x,
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
        False,
    )


@torch.library.custom_op(
    "normexp::triton_batch_forward",
    mutates_args=("running_mean", "running_var", "step", "num_rejected"),
)
def _forward_op(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    step: Tensor,
    num_rejected: Tensor,
    is_replay: bool,
    eps: float,
    momentum: float,
    regularized: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_buffers(running_mean, running_var, step, num_rejected)
    tiles = Tiles(x, mask)
    y, parts, counts = torch.empty_like(x), tiles.partial_sums(2), tiles.counts(1)
    mean, var = tiles.vector(tiles.sums_in), tiles.vector(tiles.sums_in)
    n = tiles.scalar(tiles.sums_in)
    with torch.cuda.device_of(x):
        _moments[tiles.grid](x, parts[0], parts[1], counts, **tiles.arguments)
        _finish_forward[(1,)](
            *(parts[0], parts[1], counts, running_mean, running_var, step, num_rejected),
            *(mean, var, n),
            momentum=momentum,
            regularized=regularized,
            UPDATE=not is_replay,
            **tiles.finishing,
        )
        _scale[tiles.grid](
            *(x, y, weight.contiguous(), bias.contiguous(), mean, var),
            eps=eps,
            regularized=regularized,
            **tiles.arguments,
        )
    return y, mean, var, n


@_forward_op.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels, dtype = x.shape[-1], sums_type(x)
    mean, var = x.new_empty(channels, dtype=dtype), x.new_empty(channels, dtype=dtype)
    return torch.empty_like(x), mean, var, x.new_empty((), dtype=dtype)


@torch.library.custom_op("normexp::triton_batch_backward", mutates_args=())
def _backward_op(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    n: Tensor,
    gradient: Tensor,
    d_mean: Tensor | None,
    d_var: Tensor | None,
    eps: float,
    regularized: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tiles = Tiles(x, mask)
    gradient, weight = gradient.contiguous(), weight.contiguous()
    dx, partial_sums = torch.empty_like(x), tiles.partial_sums(2)
    d_weight, d_bias = tiles.vector(tiles.sums_in), tiles.vector(tiles.sums_in)
    with torch.cuda.device_of(x):
        _sum_products[tiles.grid](x, gradient, mean, partial_sums, **tiles.arguments)
        _propagate[tiles.grid](
            *(x, gradient, dx, weight, mean, var, n),
            # Without a gradient nothing is read, but a kernel needs pointers.
            mean if d_mean is None else d_mean.contiguous(),
            mean if d_var is None else d_var.contiguous(),
            *(partial_sums, d_weight, d_bias),
            eps=eps,
            regularized=regularized,
            HAS_D_MEAN=d_mean is not None,
            HAS_D_VAR=d_var is not None,
            MANY=tiles.many,
            **tiles.arguments,
        )
    return dx, d_weight.to(weight.dtype), d_bias.to(weight.dtype)


@_backward_op.register_fake
def _(x: Tensor, mask: Tensor | None, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


class _BatchFunction(torch.autograd.Function):
    """BN: x -> y, mu_B, var_B, N."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mask: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        step: Tensor,
        num_rejected: Tensor,
        is_replay: bool,
        eps: float,
        momentum: float,
        regularized: bool,
    ) -> tuple[Tensor, ...]:
        state = running_mean, running_var, step, num_rejected
        y, mean, var, n = _forward_op(
            x, mask, weight, bias, *state, is_replay, eps, momentum, regularized
        )
        ctx.save_for_backward(x, mask, weight, mean, var, n)
        ctx.options = eps, regularized
        ctx.mark_non_differentiable(n)
        ctx.set_materialize_grads(False)
        return y, mean, var, n

    @staticmethod
    def backward(
        ctx: Any, gradient: Tensor | None, d_mean: Tensor | None, d_var: Tensor | None, _: Any
    ) -> tuple[Tensor | None, ...]:
        x, mask, weight, *statistics = ctx.saved_tensors
        if gradient is None:
            gradient = torch.zeros_like(x)
        upstream = gradient, d_mean, d_var
        if torch.is_grad_enabled():  # this gradient is to be differentiated in turn
            eps, regularized = ctx.options
            gradients = batch_gradients(
                *(x, weight, upstream, *flatten_tokens(x, mask, x.shape[-1])),
                inverse_std=lambda var: torch.rsqrt(
                    var.clamp(min=eps) if regularized else var + eps
                ),
                moments=lambda n, mean, m2: (mean, m2 / n.clamp(min=1)),
            )
        else:
            gradients = _backward_op(x, mask, weight, *statistics, *upstream, *ctx.options)
        dx, d_weight, d_bias = gradients
        return dx, None, d_weight, d_bias, *(None,) * 8


def batch(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    step: Tensor,
    num_rejected: Tensor,
    is_replay: bool,
    eps: float,
    momentum: float,
    regularized: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step of BN: x (T, B, C) or (N, C), contiguous, mask (B, T) or (N,) or None -> y.

    Returns y like x; mu_B (C,) and var_B (C,), differentiable; and N. running_mean and running_var
    (C,), step and num_rejected change, unless `is_replay`: then this repeats another forward.
    regularized: as RegularizedBatchNorm.

    Raises ValueError where x or a buffer that changes is not contiguous.
    """
    state = running_mean, running_var, step, num_rejected
    return _BatchFunction.apply(
        x, mask, weight, bias, *state, is_replay, eps, momentum, regularized
    )
