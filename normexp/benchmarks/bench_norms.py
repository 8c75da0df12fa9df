"""Time of the normalization layers, forward and backward, as multiples of nn.LayerNorm's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normexp.benchmarks.benchmark_record import write_record
from normexp.benchmarks.timing import take_turns
from normexp.norms import build_norm
from normexp.norms.kernels.choice import use_kernels

# The last is next to nothing: what a call costs by itself.
SHAPES = {
    str(shape): shape for shape in ((40, 100, 512), (8, 64, 256), (128, 256, 512), (2, 2, 256))
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Layer(NamedTuple):
    """What `build_norm` takes, and which kernels (norms/kernels) are to compute it."""

    norm: str
    options: dict[str, Any]
    kernels: str = "auto"


LAYERS = {
    "power": Layer("power", {"warmup_steps": 0}),
    "power, warm-up": Layer("power", {"warmup_steps": 10**9}),
    "power_v": Layer("power_v", {}),
    "batch": Layer("batch", {}),
    "regularized_batch": Layer("regularized_batch", {}),
    "power_released": Layer("power_released", {"warmup_steps": 0, "num_groups": 4}),
    "power_released, warm-up": Layer("power_released", {"warmup_steps": 10**9, "num_groups": 4}),
    "power, plain torch": Layer("power", {"warmup_steps": 0}, "plain"),
    "power_v, plain torch": Layer("power_v", {}, "plain"),
    "batch, plain torch": Layer("batch", {}, "plain"),
    "power_released, plain torch": Layer(
        "power_released", {"warmup_steps": 0, "num_groups": 4}, "plain"
    ),
    "unified": Layer("unified", {"warmup_steps": 0}),
    "batch_released": Layer("batch_released", {}),
}
BASELINE = "nn.LayerNorm"


def measure(rounds: int, record: Path, progress: bool) -> dict[str, Any]:
    """Time every layer at every shape and type, all competitors in turn; write to `record`.

    Ours are given a mask with a quarter of the positions padded; torch's take none. Statistics and
    parameters are float32 but for nn.LayerNorm's and F.rms_norm's parameters, which have the type
    of x. Returns what it writes: quartiles of the ratio to nn.LayerNorm, median milliseconds, and
    what computed those of ours that have running statistics.
    """
    measured = []
    for shape_name, shape in SHAPES.items():
        for dtype_name, dtype in DTYPES.items():
            calls, ran = competitors(shape, dtype)
            turns = take_turns(calls, rounds, progress)
            for name in turns.seconds:
                measured.append(
                    {
                        "shape": shape_name,
                        "dtype": dtype_name,
                        "layer": name,
                        "kernels": ran[name]() if name in ran else None,
                        "milliseconds": round(1e3 * turns.quartiles(name)[1], 4),
                        "ratio_to_layer_norm": [round(r, 3) for r in turns.ratios(name, BASELINE)],
                        "rounds_kept": len(turns.seconds[name]),
                        "rounds_dropped": turns.dropped,
                        "disturbed": turns.disturbed,
                    }
                )
    result = {
        "what": "forward and backward of a normalization layer in training, x (T, B, C)",
        "quartiles": "lower, median, upper",
        "measured": measured,
    }
    return write_record(record, "norms", {"rounds": rounds}, result)


def competitors(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    layers: dict[str, Layer] | None = None,
) -> tuple[dict[str, Callable[[], list[Tensor]]], dict[str, Callable[[], str | None]]]:
    """By name a call that computes y and the gradients of x and of the parameters.

    Beside these, for ours, a call that tells which kernels did so. layers: ours; LAYERS if not
    given.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(1)
    times, batch, channels = shape
    x = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
    gradient = torch.randn(shape, generator=generator).to(device, dtype)
    lengths = torch.linspace(times / 2, times, batch).round()
    padding_mask = (torch.arange(times) >= lengths[:, None]).to(device)

    def step(forward: Callable[[], Tensor], parameters: list[Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(forward(), [x, *parameters], gradient))

    layer_norm = nn.LayerNorm(channels, device=device, dtype=dtype)
    weight = torch.ones(channels, device=device, dtype=dtype, requires_grad=True)
    batch_norm = nn.BatchNorm1d(channels, device=device)
    calls: dict[str, Callable[[], list[Tensor]]] = {
        BASELINE: lambda: step(lambda: layer_norm(x), list(layer_norm.parameters())),
        "F.rms_norm": lambda: step(lambda: F.rms_norm(x, [channels], weight), [weight]),
        "F.batch_norm, no mask": lambda: step(
            lambda: batch_norm(x.view(-1, channels)).view(shape), list(batch_norm.parameters())
        ),
    }
    ran = {}
    for name, layer in (LAYERS if layers is None else layers).items():
        norm = build_norm(layer.norm, channels, **layer.options).to(device)

        def call(norm: nn.Module = norm, kernels: str = layer.kernels) -> list[Tensor]:
            use_kernels(kernels)
            return _step_with_penalty(step, norm, x, padding_mask)

        calls[name], ran[name] = call, lambda norm=norm: norm.kernels
    return calls, ran


def _step_with_penalty(
    step: Callable[..., list[Tensor]], norm: nn.Module, x: Tensor, padding_mask: Tensor
) -> list[Tensor]:
    gradients = step(lambda: norm(x, padding_mask), list(norm.parameters()))
    if hasattr(norm, "penalty"):
        norm.penalty()  # it must be taken; its gradient is some vectors' worth
    return gradients
