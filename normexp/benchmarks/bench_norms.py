"""Time of the normalization layers, forward and backward, as multiples of nn.LayerNorm's."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normexp.benchmarks.benchmark_record import write_record
from normexp.benchmarks.timing import interleave
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
TORCH_LAYERS = (BASELINE, "F.rms_norm", "F.batch_norm, no mask")


class Measured(NamedTuple):
    """What one layer took at one shape and type."""

    seconds: list[float]  # of a call: quartiles
    kernels: str | None  # that computed a layer of ours with running statistics
    row: dict[str, Any]  # of the record, as far as `norms` and `scaling` share it


def measure(rounds: int, record: Path, progress: bool) -> dict[str, Any]:
    """Time every layer at every shape and type, interleaved; write to `record`.

    Our layers get a mask with a quarter of the positions padded; torch's have none. Statistics and
    parameters are float32 except the parameters of nn.LayerNorm and F.rms_norm, which have the type
    of x. Returns what it writes: quartiles of the ratio to nn.LayerNorm, median milliseconds, and
    what computed those of ours that have running statistics.
    """
    measured = [
        one.row
        | {
            "shape": shape_name,
            "kernels": one.kernels,
            "milliseconds": round(1e3 * one.seconds[1], 4),
        }
        for shape_name, shape in SHAPES.items()
        for one in measure_layers(shape, LAYERS, TORCH_LAYERS, rounds, progress)
    ]
    result = {
        "what": "forward and backward of a normalization layer in training, x (T, B, C)",
        "quartiles": "lower, median, upper",
        "measured": measured,
    }
    return write_record(record, "norms", {"rounds": rounds}, result)


def measure_layers(
    shape: tuple[int, int, int],
    layers: dict[str, Layer],
    torch_layers: tuple[str, ...],
    rounds: int,
    progress: bool,
) -> Iterator[Measured]:
    """Time `layers` of ours and some of TORCH_LAYERS on x of shape (T, B, C), in every type.

    The baseline must be among `torch_layers`.
    """
    for dtype_name, dtype in DTYPES.items():
        calls, kernels = candidates(shape, dtype, layers)
        names = (*torch_layers, *layers)
        timings = interleave({name: calls[name] for name in names}, rounds, progress)
        for name in names:
            row = {
                "dtype": dtype_name,
                "layer": name,
                "ratio_to_layer_norm": [round(r, 3) for r in timings.ratios(name, BASELINE)],
                **timings.rounds,
            }
            ran = kernels[name]() if name in kernels else None
            yield Measured(timings.quartiles(name), ran, row)


def candidates(
    shape: tuple[int, int, int], dtype: torch.dtype, layers: dict[str, Layer] = LAYERS
) -> tuple[dict[str, Callable[[], list[Tensor]]], dict[str, Callable[[], str | None]]]:
    """Calls of TORCH_LAYERS and of `layers`, by name, on x of shape (T, B, C).

    The first dictionary has calls that compute y and return the gradients of x (T, B, C) and of
    each parameter (C,). The second has, for `layers`, calls that return which kernels did so.
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
        "nn.LayerNorm": lambda: step(lambda: layer_norm(x), list(layer_norm.parameters())),
        "F.rms_norm": lambda: step(lambda: F.rms_norm(x, [channels], weight), [weight]),
        "F.batch_norm, no mask": lambda: step(
            lambda: batch_norm(x.view(-1, channels)).view(shape), list(batch_norm.parameters())
        ),
    }
    ran = {}
    for name, layer in layers.items():
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
        norm.penalty()  # belongs to a training step; its gradient costs next to nothing
    return gradients
