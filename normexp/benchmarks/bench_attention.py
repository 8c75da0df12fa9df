"""Time and memory of the Tensorized Transformer's attention against the einsum of its equations."""

import gc
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normexp.benchmarks.benchmark_record import write_record
from normexp.benchmarks.timing import interleave
from normexp.fairseq_plugin.tensorized_attention import TensorizedAttention

# segment length, batch, width, d_head: the publication's, WikiText-103 with PTB's widths
SHAPES = {"ptb": (32, 120, 256, 40), "wikitext103": (80, 60, 256, 40)}
MASKS = ("published", "causal")
NAMES = ("ours", "einsum")


def measure(rounds: int, record: Path, progress: bool) -> dict[str, Any]:
    """Time forward and backward of one attention layer in float32, ours and the einsum.

    Writes to `record`, and returns, for each shape and mask quartiles of the microseconds per token
    and of the ratio between the two, and the bytes that a step needs beyond its inputs and
    parameters (on the CPU the growth of a fresh process). Raises AssertionError where the two
    differ.
    """
    measured = []
    for shape, (length, batch, width, head_dim) in SHAPES.items():
        for mask in MASKS:
            steps = {name: _step(name, shape, mask) for name in NAMES}
            _same_result(steps)
            calls = {name: step for name, (step, _) in steps.items()}
            timings = interleave(calls, rounds, progress)
            tokens = length * batch
            measured.append(
                {
                    "shape": shape,
                    "segment_len": length,
                    "batch": batch,
                    "width": width,
                    "head_dim": head_dim,
                    "attention": mask,
                    "microseconds_per_token": {
                        name: _rounded([1e6 * s / tokens for s in timings.quartiles(name)])
                        for name in NAMES
                    },
                    "ratio_of_ours_to_einsum": _rounded(timings.ratios("ours", "einsum")),
                    **timings.rounds,
                    "memory_bytes": {name: _memory(name, shape, mask) for name in NAMES},
                }
            )
    result = {
        "what": "attention of the Tensorized Transformer, forward and backward, float32",
        "quartiles": "lower, median, upper",
        "rounds": rounds,
        "measured": measured,
    }
    return write_record(record, "attention", {"rounds": rounds}, result)


def straightforward(
    attention: TensorizedAttention, x: Tensor, r: Tensor, u: Tensor, t: Tensor
) -> Tensor:
    """The equations as they stand, every M at once; arguments and result as in the layer."""
    q, k, v = attention.qkv(x.transpose(0, 1)).chunk(3, dim=-1)
    p = attention.positions(r)
    cores = []
    for a in attention.cores:
        keys = torch.einsum("h,bih,bjh->bijh", a, q + u, k)
        positions = torch.einsum("h,bih,jh->bijh", a, q + t, p)
        cores.append(torch.einsum("bijh,bmh->bijm", keys + positions, v))
    m = torch.stack(cores).mean(0)
    if attention.causal:
        visible = torch.ones(m.shape[1:], dtype=torch.bool, device=m.device)
        at = torch.arange(len(x), device=m.device)
        visible &= at[:, None] <= at[:, None, None]  # j <= i
        visible &= at <= at[:, None, None]  # m <= i
        m = m * visible
    return attention.out(m.flatten(2)).transpose(0, 1)


def _step(
    name: str, shape: str, mask: str, batch: int | None = None
) -> tuple[Callable[[], None], list[Tensor]]:
    """A call that fills the gradients of the returned tensors."""
    length, usual, width, head_dim = SHAPES[shape]
    batch = usual if batch is None else batch
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(1)
    with torch.device(device):
        attention = TensorizedAttention(width, head_dim, length, cores=1, causal=mask == "causal")
        nn.init.normal_(attention.cores)
        x = torch.randn(length, batch, width, requires_grad=True)
        r, u, t = torch.randn(length, width), torch.randn(head_dim), torch.randn(head_dim)
        gradient = torch.randn(length, batch, width)
    leaves = [x, *attention.parameters()]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        y = attention(x, r, u, t) if name == "ours" else straightforward(attention, x, r, u, t)
        y.backward(gradient)

    return step, leaves


def _same_result(steps: dict[str, tuple[Callable[[], None], list[Tensor]]]) -> None:
    for step, _ in steps.values():
        step()
    leaves = [leaves for _, leaves in steps.values()]
    for ours, theirs in zip(*leaves, strict=True):
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4 * scale)


def _memory(name: str, shape: str, mask: str) -> int:
    with multiprocessing.get_context("spawn").Pool(1) as process:
        return process.apply(_memory_of_a_step, (name, shape, mask))


def _memory_of_a_step(name: str, shape: str, mask: str) -> int:
    """Most bytes held in a step less those held before it, in this process."""
    _step(name, shape, mask, batch=1)[0]()  # what libraries hold once they are used
    step, _ = _step(name, shape, mask)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 3) for value in values]
