"""Time of the normalization layers, forward and backward, as multiples of nn.LayerNorm's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normexp.benchmarks.circumstances import write_record
from normexp.benchmarks.interleaved import take_turns
from normexp.norms import build_norm

SHAPES = {"(40, 100, 512)": (40, 100, 512), "(8, 64, 256)": (8, 64, 256),
          "(128, 256, 512)": (128, 256, 512)}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "power": ("power", {"warmup_steps": 0}),
    "power, warm-up": ("power", {"warmup_steps": 10**9}),
    "power_v": ("power_v", {}),
    "batch": ("batch", {}),
    "power_released": ("power_released", {"warmup_steps": 0, "num_groups": 4}),
    "batch_released": ("batch_released", {}),
    "regularized_batch": ("regularized_batch", {}),
    "unified": ("unified", {"warmup_steps": 0}),
}
BASELINE = "nn.LayerNorm"


def measure(rounds: int, record: Path, progress: bool) -> dict[str, Any]:
    """Time every layer at every shape and type, all competitors in turn; write to `record`.

    Ours are given a mask with a quarter of the positions padded; torch's take none. Statistics and
    parameters are float32 but for nn.LayerNorm's and F.rms_norm's parameters, which have the type
    of x. Returns what it writes: quartiles of the ratio to nn.LayerNorm, median milliseconds.
    """
    measured = []
    for shape_name, shape in SHAPES.items():
        for dtype_name, dtype in DTYPES.items():
            turns = take_turns(competitors(shape, dtype), rounds, progress)
            for name in turns.seconds:
                measured.append(
                    {
                        "shape": shape_name,
                        "dtype": dtype_name,
                        "layer": name,
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
    layers: dict[str, tuple[str, dict[str, Any]]] | None = None,
) -> dict[str, Callable[[], list[Tensor]]]:
    """By name a call that computes y and the gradients of x and of the parameters.

    layers: ours, by name what build_norm takes; LAYERS if not given.
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
    for name, (norm_name, options) in (LAYERS if layers is None else layers).items():
        norm = build_norm(norm_name, channels, **options).to(device)
        calls[name] = lambda norm=norm: _step_with_penalty(step, norm, x, padding_mask)
    return calls


def _step_with_penalty(
    step: Callable[..., list[Tensor]], norm: nn.Module, x: Tensor, padding_mask: Tensor
) -> list[Tensor]:
    gradients = step(lambda: norm(x, padding_mask), list(norm.parameters()))
    if hasattr(norm, "penalty"):
        norm.penalty()  # it must be taken; its gradient is some vectors' worth
    return gradients
