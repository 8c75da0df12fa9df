"""The benchmarks that scripts/benchmark.py runs, with their options."""

import importlib
import logging
from argparse import ArgumentTypeError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Option:
    """A whole number that a benchmark takes; `reason` says why it must be at least `least`."""

    default: int | None
    least: int = 0
    reason: str = ""
    help: str = ""

    def parse(self, text: str) -> int:
        """The number on the command line. Raises ArgumentTypeError for an impossible one."""
        if not text.isdecimal():
            raise ArgumentTypeError(f"a whole number, not {text!r}")
        if int(text) < self.least:
            raise ArgumentTypeError(f"at least {self.least}, {self.reason}")
        return int(text)


def rounds(default: int) -> dict[str, Option]:
    """The option of benchmarks that measure in rounds."""
    return {"rounds": Option(default, 2, "for quartiles")}


THREADS = Option(None, 1, "to compute with", "of torch (as many as it takes itself)")


@dataclass(frozen=True)
class Benchmark:
    """What --help says of a benchmark, and its options.

    options: whole numbers. paths, flags: names of paths and switches, with their help. in_all: the
    numbers with which the command `all` runs it, where they are not its defaults. needs_gpu: it is
    skipped there without one.
    """

    summary: str
    description: str
    options: dict[str, Option] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    flags: dict[str, str] = field(default_factory=dict)
    in_all: dict[str, int] = field(default_factory=dict)
    needs_gpu: bool = False


# By the names of modules, normexp.benchmarks.bench_NAME, whose `measure` takes the options.
BENCHMARKS = {
    "norms": Benchmark(
        "the normalization layers against nn.LayerNorm: 5 minutes",
        "Forward and backward in training, in float32 and bfloat16, all layers interleaved in one "
        "process, beside what torch.compile makes of their equations.",
        rounds(40),
        paths={
            "authors": "a clone of https://github.com/sIncerass/powernorm, whose layers run beside "
            "ours"
        },
        in_all={"rounds": 15},
    ),
    "scaling": Benchmark(
        "the same over the number of tokens, channels and groups: 3 minutes",
        "Forward and backward in training, in float32 and bfloat16.",
        rounds(15),
        in_all={"rounds": 8},
    ),
    "training": Benchmark(
        "whole training steps against stock fairseq",
        "Training steps of a translation model in several configurations, interleaved in one "
        "process.",
        rounds(9),
        in_all={"rounds": 5},
    ),
    "inference": Benchmark(
        "an encoder with its norms folded, and beam search against stock fairseq: 5 minutes",
        "Forward of an encoder with LN, PN and PN folded, in float32 and bfloat16; translation of "
        "the toy corpus by an untrained model.",
        rounds(20),
        in_all={"rounds": 8},
    ),
    "data": Benchmark(
        "how long a training step waits for its batch: 1 minute",
        "Batches of the toy corpus as a training reads them, alone and with the steps.",
        rounds(9),
    ),
    "diagnostics": Benchmark(
        "what the diagnostics of logged updates cost: 2 minutes",
        "Updates of a small Transformer with and without the statistics and gradients of its "
        "norms being looked at, interleaved in one process.",
        rounds(40),
        in_all={"rounds": 20},
    ),
    "attention": Benchmark(
        "the Tensorized Transformer's attention against the straightforward einsum: 2 minutes",
        "Forward and backward of one layer, and its memory, at the sizes of PTB and WikiText-103, "
        "published and causal. Needs Linux where there is no GPU.",
        rounds(15),
    ),
    "ranks": Benchmark(
        "what statistics of all ranks cost, by two processes on this machine: 1 minute",
        "Forward and backward of a chain of layers, statistics synchronized or not, on two ranks "
        "of one thread each.",
        rounds(40),
    ),
    "preparation": Benchmark(
        "time and memory of every stage of WMT14's preparation: 10 minutes",
        "Generates text with WMT14's lengths of sentences and words and prepares it as "
        "scripts/download.py prepares wmt14. Needs Linux and 2.5 GB of disk space per million "
        "pairs, which are freed at the end.",
        {
            "pairs": Option(1_000_000, 1000, "or starting processes is all one measures"),
            "seed": Option(1, help="of the text"),
        },
        paths={"folder": "for a temporary folder (the system's)"},
        in_all={"pairs": 200_000},
    ),
    "gpu": Benchmark(
        "everything that needs a GPU: 8 minutes",
        "Kernels against plain torch, layers against nn.LayerNorm and torch.compile, training "
        "updates of the paper's models against stock fairseq, beam search, CUDA graphs. Each part "
        "runs in a process of its own and is saved as it comes.",
        flags={"rehearsal": "the same without a GPU, in tiny sizes: shows that it runs"},
        needs_gpu=True,
    ),
}


def commands_of_all(folder: Path) -> dict[str, list[str]]:
    """The arguments of scripts/benchmark.py for each benchmark of the command `all`, by name.

    Their records are in `folder`. Together 20 minutes on two cores.
    """
    return {
        name: [
            name,
            *(word for key, value in one.in_all.items() for word in (f"--{key}", str(value))),
            *("--output", str(folder / f"{name}.json")),
        ]
        for name, one in BENCHMARKS.items()
    }


def measure(
    name: str, record: Path, progress: bool, threads: int | None = None, **options: Any
) -> dict[str, Any]:
    """Run a benchmark with its options, write `record` and return its content.

    threads: number of torch's threads (default: torch's own choice). progress: show a bar.
    """
    # Here, because torch takes a second to load, and --help should not.
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    logging.getLogger("fairseq").setLevel(logging.WARNING)  # it logs every batch iterator
    module = importlib.import_module(f"normexp.benchmarks.bench_{name}")
    return module.measure(**options, record=record, progress=progress)
