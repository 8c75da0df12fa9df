"""Cost of statistics synchronized over ranks: two processes on this machine, with gloo."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from tqdm import tqdm

from normexp.benchmarks.benchmark_record import write_record
from normexp.benchmarks.timing import quartiles
from normexp.norms import build_norm
from normexp.norms.kernels.choice import chosen_kernels, use_kernels

RANKS = 2
LAYERS = 12
TIME, BATCH, CHANNELS = 64, 8, 256
_CALLS = 5  # of a candidate in a round

CANDIDATES: dict[str, tuple[str, dict[str, Any], str]] = {
    "layer": ("layer", {}, "auto"),
    "power, each rank its own": ("power", {"warmup_steps": 0}, "auto"),
    "power, synchronized": ("power", {"warmup_steps": 0, "sync": True}, "auto"),
    "power, synchronized, torch alone": ("power", {"warmup_steps": 0, "sync": True}, "plain"),
    "power in its warm-up, synchronized": ("power", {"warmup_steps": 10**9, "sync": True}, "auto"),
    "batch, synchronized": ("batch", {"sync": True}, "auto"),
}


def measure(rounds: int, record: Path, progress: bool) -> dict[str, Any]:
    """Time forward and backward of chains of layers, interleaved, on two ranks of one thread each.

    Writes to `record`, and returns, for each candidate quartiles of the milliseconds of a step and
    of its ratio to nn.LayerNorm, and the number of collectives in a step. All rounds are kept.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = (rounds, progress, Path(folder))
        torch.multiprocessing.spawn(_run, args=arguments, nprocs=RANKS)
        measured = torch.load(Path(folder) / "measured.pt", weights_only=True)
    torch.set_num_threads(1)  # as the ranks have, for the record
    seconds = {name: of["seconds"] for name, of in measured.items()}
    result = {
        "what": f"forward and backward of {LAYERS} layers on {RANKS} ranks, float32",
        "shape": [TIME, BATCH, CHANNELS],
        "layers": LAYERS,
        "ranks": RANKS,
        "quartiles": "lower, median, upper",
        "rounds": rounds,
        "measured": [
            {
                "layer": name,
                "milliseconds": [round(1e3 * value, 3) for value in quartiles(own)],
                "ratio_to_layer": [
                    round(value, 3)
                    for value in quartiles(
                        [one / other for one, other in zip(own, seconds["layer"], strict=True)]
                    )
                ],
                "collectives": measured[name]["collectives"],
            }
            for name, own in seconds.items()
        ],
    }
    return write_record(record, "ranks", {"rounds": rounds}, result)


def _run(rank: int, rounds: int, progress: bool, folder: Path) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    steps = {name: _step(*of, rank) for name, of in CANDIDATES.items()}
    measured: dict[str, dict[str, Any]] = {}
    for name, step in steps.items():
        step()
        with _counted() as collectives:
            step()
        measured[name] = {"seconds": [], "collectives": len(collectives)}
    hidden = rank > 0 or not progress
    for _ in tqdm(range(rounds), "rounds", leave=False, disable=hidden or None):
        for name, step in steps.items():
            dist.barrier()
            start = time.perf_counter()
            for _ in range(_CALLS):
                step()
            measured[name]["seconds"].append((time.perf_counter() - start) / _CALLS)
    if rank == 0:
        torch.save(measured, folder / "measured.pt")
    dist.destroy_process_group()


def _step(norm: str, options: dict[str, Any], kernels: str, rank: int) -> Callable[[], None]:
    layers = nn.ModuleList(
        nn.LayerNorm(CHANNELS) if norm == "layer" else build_norm(norm, CHANNELS, **options)
        for _ in range(LAYERS)
    )
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(TIME, BATCH, CHANNELS, generator=generator)
    gradient = torch.randn(TIME, BATCH, CHANNELS, generator=generator)
    pad = torch.zeros(BATCH, TIME, dtype=torch.bool)
    pad[:, TIME - TIME // 8 :] = True

    def step() -> None:
        before = chosen_kernels()
        use_kernels(kernels)
        layers.zero_grad()
        y = x
        for layer in layers:
            y = layer(y) if norm == "layer" else layer(y, pad)
        y.backward(gradient)
        use_kernels(before)

    return step


@contextlib.contextmanager
def _counted() -> Iterator[list[str]]:
    calls: list[str] = []
    names = ("all_reduce", "all_gather")
    originals = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
