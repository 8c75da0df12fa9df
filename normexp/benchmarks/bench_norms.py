"""Time of the normalization layers, forward and backward, as multiples of nn.LayerNorm's."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normexp.benchmarks.authors_layers import authors_layers
from normexp.benchmarks.benchmark_record import write_record
from normexp.benchmarks.peers import (
    Peer,
    compiled_peers,
    gpu_peers,
    of_module,
    peer_versions,
)
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
    "unified": Layer("unified", {"warmup_steps": 0}),
    "batch_released": Layer("batch_released", {}),
    "rms": Layer("rms", {}),
    "power, plain torch": Layer("power", {"warmup_steps": 0}, "plain"),
    "power_v, plain torch": Layer("power_v", {}, "plain"),
    "batch, plain torch": Layer("batch", {}, "plain"),
    "power_released, plain torch": Layer(
        "power_released", {"warmup_steps": 0, "num_groups": 4}, "plain"
    ),
    "unified, plain torch": Layer("unified", {"warmup_steps": 0}, "plain"),
    "batch_released, plain torch": Layer("batch_released", {}, "plain"),
}
BASELINE = "nn.LayerNorm"
TORCH_LAYERS = (BASELINE, "F.rms_norm", "F.batch_norm, no mask")
# Compiling is slow on a CPU, so not all that compiled_layers has.
COMPILED = ("power", "batch")


class Measured(NamedTuple):
    """What one layer took at one shape and type."""

    seconds: list[float]  # of a call: quartiles
    kernels: str | None  # that computed a layer of ours with running statistics
    row: dict[str, Any]  # of the record, as far as `norms` and `scaling` share it


class Inputs(NamedTuple):
    """x and a gradient (T, B, C), and a mask (B, T) with a quarter of the positions padded."""

    x: Tensor
    gradient: Tensor
    padding_mask: Tensor


class Candidate(NamedTuple):
    """A layer to be timed: its forward in training, its parameters, which kernels ran last."""

    forward: Callable[[], Tensor]
    parameters: list[nn.Parameter]
    kernels: Callable[[], str | None] = lambda: None

    def gradients(self, inputs: Inputs) -> list[Tensor]:
        """The gradients of x (T, B, C) and of each parameter (C,), by forward and backward."""
        leaves = [inputs.x, *self.parameters]
        return list(torch.autograd.grad(self.forward(), leaves, inputs.gradient))


def measure(rounds: int, authors: Path | None, record: Path, progress: bool) -> dict[str, Any]:
    """Time every layer at every shape and type, interleaved; write to `record`.

    Our layers and their peers get a mask with a quarter of the positions padded; layers of torch,
    Liger and quack have none. Statistics and parameters are float32 except those layers', which
    have the type of x. authors: a clone of the authors' repository; its layers run beside ours in
    float32, the only type that they take. Returns what it writes: quartiles of the ratio to
    nn.LayerNorm and to the authors' layer, median milliseconds, what computed those of ours that
    have running statistics, and the peers that were skipped, with the reasons.
    """
    theirs = authors_layers(authors) if authors is not None else {}
    skipped: dict[str, str] = {}
    if authors is None:
        skipped["the authors' layers"] = "no --authors PATH was given"

    def peers(channels: int, device: torch.device, dtype: torch.dtype) -> dict[str, Peer]:
        layers = {
            f"{name}, authors": of_module(build(channels).to(device))
            for name, build in theirs.items()
            if dtype == torch.float32
        }
        for one in (
            compiled_peers(channels, device, COMPILED),
            gpu_peers(channels, device, dtype),
        ):
            layers |= one.layers
            skipped.update(one.skipped)
        return layers

    measured = [
        one.row
        | {
            "shape": shape_name,
            "kernels": one.kernels,
            "milliseconds": round(1e3 * one.seconds[1], 4),
        }
        for shape_name, shape in SHAPES.items()
        for one in measure_layers(shape, LAYERS, TORCH_LAYERS, rounds, progress, peers)
    ]
    result = {
        "what": "forward and backward of a normalization layer in training, x (T, B, C)",
        "quartiles": "lower, median, upper",
        "measured": measured,
        "peer_versions": peer_versions(),
        "skipped": skipped,
    }
    options = {"rounds": rounds, "authors": authors and "PATH"}
    return write_record(record, "norms", options, result)


def measure_layers(
    shape: tuple[int, int, int],
    layers: dict[str, Layer],
    torch_layers: tuple[str, ...],
    rounds: int,
    progress: bool,
    peers: Callable[[int, torch.device, torch.dtype], Mapping[str, Peer]] = lambda *_: {},
) -> Iterator[Measured]:
    """Time `layers` of ours and some of TORCH_LAYERS on x of shape (T, B, C), in every type.

    The baseline must be among `torch_layers`. peers: gives other layers for a number of channels,
    a device and a type. Where the authors' layers are among them, rows of ours have the ratio to
    their batch or power norm, too.
    """
    for dtype_name, dtype in DTYPES.items():
        inputs = make_inputs(shape, dtype)
        x = inputs.x
        others = peers(shape[-1], x.device, dtype)
        found = candidates(inputs, layers) | peer_candidates(inputs, others)
        found = {name: found[name] for name in (*torch_layers, *layers, *others)}
        calls = {name: partial(one.gradients, inputs) for name, one in found.items()}
        timings = interleave(calls, rounds, progress)
        for name, one in found.items():
            row = {
                "dtype": dtype_name,
                "layer": name,
                "ratio_to_layer_norm": [round(r, 3) for r in timings.ratios(name, BASELINE)],
                **timings.rounds,
            }
            theirs = "batch, authors" if "batch" in name else "power, authors"
            if name in layers and theirs in found:
                row["ratio_to_authors"] = [round(r, 4) for r in timings.ratios(name, theirs)]
            yield Measured(timings.quartiles(name), one.kernels(), row)


def make_inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> Inputs:
    """Inputs of shape (T, B, C), on the GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(1)
    times, batch, _ = shape
    x = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
    gradient = torch.randn(shape, generator=generator).to(device, dtype)
    lengths = torch.linspace(times / 2, times, batch).round()
    return Inputs(x, gradient, (torch.arange(times) >= lengths[:, None]).to(device))


def candidates(inputs: Inputs, layers: Mapping[str, Layer] = LAYERS) -> dict[str, Candidate]:
    """TORCH_LAYERS and `layers` by name."""
    return _torch_candidates(inputs) | _layer_candidates(inputs, layers)


def _torch_candidates(inputs: Inputs) -> dict[str, Candidate]:
    x = inputs.x
    channels, options = x.shape[-1], {"device": x.device, "dtype": x.dtype}
    layer_norm = nn.LayerNorm(channels, **options)
    weight = nn.Parameter(torch.ones(channels, **options))
    batch_norm = nn.BatchNorm1d(channels, device=x.device)

    def batch() -> Tensor:
        return batch_norm(x.view(-1, channels)).view(x.shape)

    return {
        BASELINE: Candidate(lambda: layer_norm(x), list(layer_norm.parameters())),
        "F.rms_norm": Candidate(lambda: F.rms_norm(x, [channels], weight), [weight]),
        "F.batch_norm, no mask": Candidate(batch, list(batch_norm.parameters())),
    }


def _layer_candidates(inputs: Inputs, layers: Mapping[str, Layer]) -> dict[str, Candidate]:
    found = {}
    for name, layer in layers.items():
        norm = build_norm(layer.norm, inputs.x.shape[-1], **layer.options).to(inputs.x.device)

        # The choice of kernels is the process's.
        def forward(norm: nn.Module = norm, kernels: str = layer.kernels) -> Tensor:
            use_kernels(kernels)
            y = norm(inputs.x, inputs.padding_mask)
            if hasattr(norm, "penalty"):
                norm.penalty()  # belongs to a training step; its gradient costs next to nothing
            return y

        found[name] = Candidate(forward, list(norm.parameters()), lambda norm=norm: norm.kernels)
    return found


def peer_candidates(inputs: Inputs, peers: Mapping[str, Peer]) -> dict[str, Candidate]:
    """Layers of other software by name."""
    return {
        name: Candidate(
            lambda peer=peer: peer.forward(inputs.x, inputs.padding_mask), peer.parameters
        )
        for name, peer in peers.items()
    }
