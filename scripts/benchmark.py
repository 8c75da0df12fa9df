#!/usr/bin/env python
"""Measure, print the tables and write the record to results/benchmarks/.

    python scripts/benchmark.py norms           # every layer against nn.LayerNorm
    python scripts/report.py                    # results/benchmarks/README.md from the records

Numbers are comparable only within one record; leave the machine alone meanwhile.
"""

import argparse
import importlib
import logging
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normexp.errors import UserError
from normexp.paths import RESULTS

RECORDS = RESULTS / "benchmarks"
_BYTES_PER_PAIR = 2500


@dataclass(frozen=True)
class Benchmark:
    """What --help says of a benchmark, and how many rounds it takes; None: it has none."""

    summary: str
    description: str
    rounds: int | None


# Names of modules in normexp.benchmarks.
BENCHMARKS = {
    "norms": Benchmark(
        "the normalization layers against nn.LayerNorm: 3 minutes",
        "Forward and backward in training, in float32 and bfloat16, all layers in turn in one "
        "process.",
        40,
    ),
    "scaling": Benchmark(
        "the same over the number of tokens, channels and groups: 3 minutes",
        "Forward and backward in training, in float32 and bfloat16.",
        15,
    ),
    "training": Benchmark(
        "whole training steps against stock fairseq",
        "Training steps of a translation model in several configurations, in turn in one process.",
        9,
    ),
    "inference": Benchmark(
        "an encoder with its norms folded, and beam search against stock fairseq: 5 minutes",
        "Forward of an encoder with LN, PN and PN folded, in float32 and bfloat16; translation of "
        "the toy corpus by an untrained model.",
        20,
    ),
    "data": Benchmark(
        "how long a training step waits for its batch: 1 minute",
        "Batches of the toy corpus as a training reads them, alone and with the steps.",
        9,
    ),
    "diagnostics": Benchmark(
        "what the diagnostics of logged updates cost: 2 minutes",
        "Updates of a small Transformer with and without the statistics and gradients of its "
        "norms being looked at, in turn in one process.",
        40,
    ),
    "attention": Benchmark(
        "the Tensorized Transformer's attention against the straightforward einsum: 2 minutes",
        "Forward and backward of one layer, and its memory, at the sizes of PTB and WikiText-103, "
        "published and causal. Needs Linux where there is no GPU.",
        15,
    ),
    "ranks": Benchmark(
        "what statistics of all ranks cost, by two processes on this machine: 1 minute",
        "Forward and backward of a chain of layers, statistics synchronized or not, on two ranks "
        "of one thread each.",
        40,
    ),
    "preparation": Benchmark(
        "time and memory of every stage of WMT14's preparation: 10 minutes",
        "Generates text with WMT14's lengths of sentences and words and prepares it as "
        "scripts/download.py prepares wmt14. Needs Linux and 2.5 GB of disk space per million "
        "pairs, which are freed at the end.",
        None,
    ),
}


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, benchmark in BENCHMARKS.items():
        command = commands.add_parser(
            name, help=benchmark.summary, description=benchmark.description
        )
        if benchmark.rounds is not None:
            command.add_argument(
                "--rounds", type=int, default=benchmark.rounds, help="(%(default)s)"
            )
        command.add_argument("--threads", type=int, help="of torch (as many as it takes itself)")
        command.add_argument(
            "--output", type=Path, default=RECORDS / f"{name}.json", help="record (%(default)s)"
        )
    preparation = commands.choices["preparation"]
    preparation.add_argument("--pairs", type=int, default=1_000_000, help="(%(default)s)")
    preparation.add_argument("--seed", type=int, default=1, help="of the text (%(default)s)")
    preparation.add_argument("--folder", type=Path, help="for the text (a temporary folder)")
    arguments = parser.parse_args()
    command = commands.choices[arguments.benchmark]
    for option, least, reason in (
        ("rounds", 2, "for quartiles"),
        ("pairs", 1000, "or starting processes is all one measures"),
        ("threads", 1, "to compute with"),
    ):
        value = getattr(arguments, option, None)
        if value is not None and value < least:
            command.error(f"--{option}: at least {least}, {reason}")
    _show(arguments.benchmark, _measured(arguments))
    print(f"Record: {arguments.output}")


def _measured(arguments: argparse.Namespace) -> dict[str, Any]:
    # Here, because torch takes a second to load, and --help should not.
    import torch

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    logging.getLogger("fairseq").setLevel(logging.WARNING)  # it tells of every batch iterator
    measure = importlib.import_module(f"normexp.benchmarks.bench_{arguments.benchmark}").measure
    progress = sys.stderr.isatty()
    if arguments.benchmark != "preparation":
        return measure(arguments.rounds, arguments.output, progress)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("normexp.benchmarks.bench_preparation").setLevel(logging.INFO)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        free, needed = shutil.disk_usage(folder).free, arguments.pairs * _BYTES_PER_PAIR
        if free < needed:
            raise UserError(
                f"{needed / 1e9:.1f} GB are needed in {folder}, {free / 1e9:.1f} GB are free; "
                "make room, choose another --folder or fewer --pairs"
            )
        return measure(arguments.pairs, arguments.seed, Path(folder), arguments.output, progress)


def _show(benchmark: str, record: dict[str, Any]) -> None:
    from rich.console import Console

    from normexp.report.benchmark_tables import tables
    from normexp.report.console import print_table

    console = Console() if sys.stdout.isatty() else Console(width=200)
    for title, table in tables(benchmark, record):
        print_table(title, table, console)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
