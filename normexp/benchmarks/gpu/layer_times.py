"""Layers against F.layer_norm: forward, and forward with backward, and by torch.compile."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

from normexp.benchmarks.bench_norms import (
    BASELINE,
    DTYPES,
    Candidate,
    Inputs,
    Layer,
    candidates,
    make_inputs,
    peer_candidates,
)
from normexp.benchmarks.gpu.graphs import captured
from normexp.benchmarks.gpu.section import Row, device, one_line, timed
from normexp.benchmarks.peers import compiled_peers, gpu_peers

# 32,768 tokens of two widths, and an update of IWSLT14's size.
SHAPES = ((128, 256, 512), (128, 256, 1024), (40, 100, 512))
REHEARSED_SHAPES = ((3, 4, 8),)
ROUNDS = 15
LAYERS = {
    "power": Layer("power", {"warmup_steps": 0}, "triton"),
    "power, warm-up": Layer("power", {"warmup_steps": 10**9}, "triton"),
    "power_v": Layer("power_v", {}, "triton"),
    "batch": Layer("batch", {}, "triton"),
    "regularized_batch": Layer("regularized_batch", {}, "triton"),
    "power_released": Layer("power_released", {"warmup_steps": 0, "num_groups": 4}, "triton"),
    "power, plain torch": Layer("power", {"warmup_steps": 0}, "plain"),
    "batch, plain torch": Layer("batch", {}, "plain"),
}
COMPILED = ("power", "power_v", "batch", "power_released")
OURS_BESIDE_COMPILED = {name: LAYERS[name] for name in COMPILED}
# Passes over x of the layer that needs least: read x, write y; read x and dL/dy, write dL/dx.
_PASSES = {"forward": 2, "forward + backward": 5}
_COPIED_BYTES = 2**30


def copy_rows(rehearsal: bool) -> Iterator[Row]:
    """Yield the rate at which the device copies, in bytes read and written per second."""
    number = 2**20 if rehearsal else _COPIED_BYTES
    source = torch.randint(0, 255, (number,), dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    timings = timed({"copy": lambda: target.copy_(source)}, ROUNDS, rehearsal)
    seconds = timings.quartiles("copy")[1]
    yield {"bytes": number, "bytes_per_second": float(f"{2 * number / seconds:.4g}")}


def rows(rehearsal: bool) -> Iterator[Row]:
    """Yield every layer at every size and type; at the smallest also replayed by CUDA graphs."""
    shapes = REHEARSED_SHAPES if rehearsal else SHAPES
    for shape in shapes:
        for dtype in DTYPES:
            inputs = make_inputs(shape, DTYPES[dtype])
            peers = gpu_peers(shape[-1], inputs.x.device, inputs.x.dtype)
            yield from ({"skipped": name, "reason": why} for name, why in peers.skipped.items())
            found = candidates(inputs, LAYERS) | peer_candidates(inputs, peers.layers)
            found, failed = _working(inputs, found)
            yield from failed
            yield from _timed(inputs, dtype, found, rehearsal)
            if shape == shapes[-1]:
                yield from _replayed(inputs, dtype, found, rehearsal)


def compiled_rows(rehearsal: bool) -> Iterator[Row]:
    """Yield torch.compile of the equations of layers beside their kernels and F.layer_norm."""
    for shape in REHEARSED_SHAPES if rehearsal else SHAPES:
        for dtype in DTYPES:
            inputs = make_inputs(shape, DTYPES[dtype])
            # Compiling for the CPU takes minutes and says nothing of a GPU.
            backend = "eager" if rehearsal else "inductor"
            peers = compiled_peers(shape[-1], inputs.x.device, COMPILED, backend)
            yield from ({"skipped": name, "reason": why} for name, why in peers.skipped.items())
            found = candidates(inputs, OURS_BESIDE_COMPILED)
            found |= peer_candidates(inputs, peers.layers)
            found, failed = _working(inputs, found)
            yield from failed
            yield from _timed(inputs, dtype, found, rehearsal)


def _working(
    inputs: Inputs, found: Mapping[str, Candidate]
) -> tuple[dict[str, Candidate], list[Row]]:
    """Candidates that get through a step, and rows that say why others do not."""
    working, failed = {}, []
    for name, candidate in found.items():
        try:
            candidate.gradients(inputs)
        except Exception as error:  # of foreign code too; the other candidates are to be measured
            failed.append({"skipped": name, "reason": one_line(error)})
        else:
            working[name] = candidate
    return working, failed


def _timed(
    inputs: Inputs, dtype: str, found: Mapping[str, Candidate], rehearsal: bool
) -> Iterator[Row]:
    calls = {
        "forward": {name: one.forward for name, one in found.items()},
        "forward + backward": {name: partial(one.gradients, inputs) for name, one in found.items()},
    }
    for what, each in calls.items():
        yield from _rows_of(inputs, dtype, what, _PASSES[what], each, rehearsal)


def _replayed(
    inputs: Inputs, dtype: str, found: Mapping[str, Candidate], rehearsal: bool
) -> Iterator[Row]:
    """With small tensors a GPU waits between kernels; when they are replayed it does not."""
    calls, passes = {}, _PASSES["forward + backward"]
    for name, one in found.items():
        if name.endswith("plain torch"):
            continue
        try:
            calls[name] = captured(partial(one.gradients, inputs))
        except Exception as error:  # of foreign code that reads values on the host
            yield {"skipped": f"{name}, CUDA graph", "reason": one_line(error)}
    what = "forward + backward, CUDA graph"
    yield from _rows_of(inputs, dtype, what, passes, calls, rehearsal)


def _rows_of(
    inputs: Inputs,
    dtype: str,
    what: str,
    passes: int,
    calls: Mapping[str, Callable[[], object]],
    rehearsal: bool,
) -> Iterator[Row]:
    timings = timed(calls, ROUNDS, rehearsal)
    least = passes * inputs.x.numel() * inputs.x.element_size()
    for name in calls:
        seconds = timings.quartiles(name)
        yield {
            "shape": str(tuple(inputs.x.shape)),
            "dtype": dtype,
            "what": what,
            "layer": name,
            "microseconds": round(1e6 * seconds[1], 2),
            "ratio_to_layer_norm": [round(r, 3) for r in timings.ratios(name, BASELINE)],
            # As if each layer needed the passes of the one that needs least.
            "bytes_per_second": float(f"{least / seconds[1]:.4g}"),
            **timings.rounds,
        }
