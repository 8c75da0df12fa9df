"""Building blocks of all kernels: passes over the rows of a batch, and sums over the programs.

A program has the channels `channel` (WIDTH,), of which those `within` exist, and every P-th tile of
ROWS rows. Rows are tokens of a contiguous x (T, B, C) or (N, C); the mask is read in place, a byte
at b sentence_stride + t time_stride. Values at padding are never read.
"""

import triton
import triton.language as tl


@triton.jit
def channels_of_program(channels, WIDTH: tl.constexpr):
    """The program's channels (WIDTH,), and flags: the channel exists."""
    channel = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    return channel, channel < channels


@triton.jit
def tile_of_rows(
    first,
    mask,
    rows,
    channels,
    sentences,
    sentence_stride,
    time_stride,
    HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Offsets of ROWS rows (ROWS, 1), and flags (ROWS,): the row exists, it is a real token."""
    row = first + tl.arange(0, ROWS)
    inside = row < rows
    token_mask = inside
    if HAS_MASK:
        at = (row % sentences).to(tl.int64) * sentence_stride
        at += (row // sentences).to(tl.int64) * time_stride
        token_mask = inside & (tl.load(mask + at, mask=inside, other=1) == 0)
    return (row.to(tl.int64) * channels)[:, None], inside, token_mask


@triton.jit
def values_at(pointer, channel, within):
    """Load values per channel (WIDTH,) in float64; 1 where there is no channel."""
    return tl.load(pointer + channel, mask=within, other=1.0).to(tl.float64)


@triton.jit
def total(
    partial_sums, programs, channels, channel, within, MANY: tl.constexpr, WIDTH: tl.constexpr
):
    """Sum of partial_sums (P, C) over the programs: (WIDTH,) float64, in a fixed order."""
    result = tl.zeros([MANY, WIDTH], tl.float64)
    for first in range(0, programs, MANY):
        program = first + tl.arange(0, MANY)
        exists = (program < programs)[:, None] & within[None, :]
        at = program[:, None] * channels + channel[None, :]
        result += tl.load(partial_sums + at, mask=exists, other=0.0).to(tl.float64)
    return tl.sum(result, axis=0)


@triton.jit
def total_count(counts, programs, MANY: tl.constexpr):
    """Sum of counts (P,) over the programs, a float64 scalar."""
    result = tl.zeros([MANY], tl.float64)
    for first in range(0, programs, MANY):
        program = first + tl.arange(0, MANY)
        result += tl.load(counts + program, mask=program < programs, other=0).to(tl.float64)
    return tl.sum(result, axis=0)


@triton.jit
def store_sums(partial_sums, channels, channel, within, values):
    """Store a program's values, summed over its rows, in its row of partial_sums (P, C)."""
    at = tl.program_id(1) * channels + channel
    tl.store(partial_sums + at, tl.sum(values, axis=0), mask=within)


@triton.jit
def store_count(counts, token_mask):
    """Store a program's number of real tokens, from counts (ROWS,), in its entry of counts (P,)."""
    if tl.program_id(0) == 0:
        tl.store(counts + tl.program_id(1), tl.sum(token_mask, axis=0))


@triton.jit
def all_finite(values, within, like):
    """Whether the values are finite in the type of the buffer `like`."""
    # What is finite in float64 may not be so in the buffers' float32.
    size = tl.abs(values.to(like.dtype.element_ty))
    broken = within & ((size != size) | (size == float("inf")))
    return tl.sum(broken.to(tl.int32), axis=0) == 0


@triton.jit
def count_one_if(counter, condition):
    """counter <- counter + 1, if condition."""
    tl.store(counter, tl.load(counter) + condition.to(tl.int64))


@triton.jit
def lerp(before, value, update_rate: tl.constexpr):
    """(1 - update_rate) before + update_rate value, exact at both ends as torch.lerp is."""
    apart = value - before
    result = before + update_rate * apart
    if update_rate >= 0.5:
        result = value - (1.0 - update_rate) * apart
    return result


@triton.jit
def average(running, channel, within, value, update_rate: tl.constexpr, usable):
    """running (C,) <- (1 - update_rate) running + update_rate value, if usable."""
    before = values_at(running, channel, within)
    after = tl.where(usable, lerp(before, value, update_rate), before)
    tl.store(running + channel, after, mask=within)


@triton.jit
def sum_products(
    x,
    gradient,
    mean,
    partial_sums,
    channel,
    within,
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
    """partial_sums (2, P, C) over the real tokens: of gradient (x - mean) and of gradient."""
    products = tl.zeros([ROWS, WIDTH], SUMS_IN)
    plain = tl.zeros([ROWS, WIDTH], SUMS_IN)
    stride = tl.num_programs(1) * ROWS
    for first in range(tl.program_id(1) * ROWS, rows, stride):
        at, _, token_mask = tile_of_rows(
            first, mask, rows, channels, sentences, sentence_stride, time_stride, HAS_MASK, ROWS
        )
        wanted = token_mask[:, None] & within[None, :]
        value = tl.load(x + at + channel[None, :], mask=wanted, other=0.0).to(SUMS_IN)
        g = tl.load(gradient + at + channel[None, :], mask=wanted, other=0.0).to(SUMS_IN)
        products += g * (value - mean[None, :])
        plain += g
    store_sums(partial_sums, channels, channel, within, products)
    store_sums(partial_sums + tl.num_programs(1) * channels, channels, channel, within, plain)


@triton.jit
def propagate(
    x,
    gradient,
    dx,
    mean,
    scale,
    slope,
    shift,
    partial_sums,
    channel,
    within,
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
    SUM: tl.constexpr,
):
    """dx = gradient scale + (x - mean) slope + shift, 0 at padding; with SUM as sum_products."""
    products = tl.zeros([ROWS, WIDTH], SUMS_IN)
    plain = tl.zeros([ROWS, WIDTH], SUMS_IN)
    stride = tl.num_programs(1) * ROWS
    for first in range(tl.program_id(1) * ROWS, rows, stride):
        at, inside, token_mask = tile_of_rows(
            first, mask, rows, channels, sentences, sentence_stride, time_stride, HAS_MASK, ROWS
        )
        wanted = token_mask[:, None] & within[None, :]
        value = tl.load(x + at + channel[None, :], mask=wanted, other=0.0).to(SUMS_IN)
        g = tl.load(gradient + at + channel[None, :], mask=wanted, other=0.0).to(SUMS_IN)
        centered = value - mean[None, :]
        result = g * scale[None, :] + centered * slope[None, :] + shift[None, :]
        result = tl.where(token_mask[:, None], result, 0.0)
        tl.store(dx + at + channel[None, :], result, mask=inside[:, None] & within[None, :])
        if SUM:
            products += g * centered
            plain += g
    if SUM:
        store_sums(partial_sums, channels, channel, within, products)
        store_sums(partial_sums + tl.num_programs(1) * channels, channels, channel, within, plain)


@triton.jit
def scale_rows(
    x,
    y,
    mean,
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
    HAS_MASK: tl.constexpr,
    SUMS_IN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SUM: tl.constexpr,
):
    """y = (x - mean) scale + shift, 0 at padding; with SUM sums of x^2 and counts of tokens."""
    sum_sq = tl.zeros([ROWS, WIDTH], SUMS_IN)
    seen = tl.zeros([ROWS], tl.int32)
    stride = tl.num_programs(1) * ROWS
    for first in range(tl.program_id(1) * ROWS, rows, stride):
        at, inside, token_mask = tile_of_rows(
            first, mask, rows, channels, sentences, sentence_stride, time_stride, HAS_MASK, ROWS
        )
        wanted = token_mask[:, None] & within[None, :]
        value = tl.load(x + at + channel[None, :], mask=wanted, other=0.0).to(SUMS_IN)
        result = (value - mean[None, :]) * scale[None, :] + shift[None, :]
        result = tl.where(token_mask[:, None], result, 0.0)
        tl.store(y + at + channel[None, :], result, mask=inside[:, None] & within[None, :])
        if SUM:
            sum_sq += value * value
            seen += token_mask.to(tl.int32)
    if SUM:
        store_sums(partial_sums, channels, channel, within, sum_sq)
        store_count(counts, seen)
