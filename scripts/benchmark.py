#!/usr/bin/env python
"""Measure, print a table and write the record to results/benchmarks/.

    python scripts/benchmark.py preparation     # WMT14's preparation on made-up text: 10 minutes
    python scripts/benchmark.py attention       # the Tensorized Transformer's attention: 2 minutes
    python scripts/benchmark.py norms           # every layer against nn.LayerNorm: 3 minutes

Numbers are comparable only within one record; leave the machine alone meanwhile.
"""

import argparse
import logging
import shutil
import sys
import tempfile
from pathlib import Path

from normexp.errors import UserError

RECORDS = Path(__file__).resolve().parents[1] / "results" / "benchmarks"
_BYTES_PER_PAIR = 2500


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    preparation = benchmarks.add_parser(
        "preparation",
        help="time and memory of every stage of WMT14's preparation",
        description="Generates text with WMT14's lengths of sentences and words and prepares it as "
        "scripts/download.py prepares wmt14. Needs Linux and 2.5 GB of disk space per million "
        "pairs, which are freed at the end.",
    )
    preparation.add_argument("--pairs", type=int, default=1_000_000, help="(%(default)s)")
    preparation.add_argument("--seed", type=int, default=1, help="of the text (%(default)s)")
    preparation.add_argument("--folder", type=Path, help="for the text (a temporary folder)")
    attention = benchmarks.add_parser(
        "attention",
        help="time and memory per token against the straightforward einsum",
        description="Forward and backward of one layer at the sizes of PTB and WikiText-103, "
        "published and causal. Needs Linux where there is no GPU.",
    )
    attention.add_argument("--rounds", type=int, default=15, help="(%(default)s)")
    norms = benchmarks.add_parser(
        "norms",
        help="time of the normalization layers against nn.LayerNorm",
        description="Forward and backward in training, in float32 and bfloat16, all layers in "
        "turn in one process.",
    )
    norms.add_argument("--rounds", type=int, default=40, help="(%(default)s)")
    for command in (preparation, attention, norms):
        name = command.prog.split()[-1]
        command.add_argument(
            "--output", type=Path, default=RECORDS / f"{name}.json", help="record (%(default)s)"
        )
    arguments = parser.parse_args()
    if arguments.benchmark == "preparation":
        if arguments.pairs < 1000:
            preparation.error("--pairs: at least 1000, or starting processes is all one measures")
        _preparation(arguments)
    else:
        if arguments.rounds < 2:
            parser.error("--rounds: at least 2, for quartiles")
        (_attention if arguments.benchmark == "attention" else _norms)(arguments)
    print(f"Record: {arguments.output}")


def _preparation(arguments: argparse.Namespace) -> None:
    from normexp.benchmarks.preparation import measure

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("normexp.benchmarks.preparation").setLevel(logging.INFO)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        free, needed = shutil.disk_usage(folder).free, arguments.pairs * _BYTES_PER_PAIR
        if free < needed:
            raise UserError(
                f"{needed / 1e9:.1f} GB are needed in {folder}, {free / 1e9:.1f} GB are free; "
                "make room, choose another --folder or fewer --pairs"
            )
        result = measure(
            arguments.pairs, arguments.seed, Path(folder), arguments.output, sys.stderr.isatty()
        )
    real = result["real_corpus"]
    print(
        f"{result['total_seconds']:.0f} s in all, at most {result['peak_memory_bytes'] / 1e9:.2f} "
        f"GB; {real['pairs']:,} pairs would take at most {real['hours_at_most']:.1f} hours."
    )


def _attention(arguments: argparse.Namespace) -> None:
    from normexp.benchmarks.attention import measure

    result = measure(arguments.rounds, arguments.output, sys.stderr.isatty())
    print(f"{'shape':<12} {'attention':<10} {'':<7} {'µs/token':>9} {'MB':>7} {'ours/einsum':>18}")
    for one in result["measured"]:
        low, median, high = one["ratio_of_ours_to_einsum"]
        for name, times in one["microseconds_per_token"].items():
            ratio = f"{median:.2f} ({low:.2f}-{high:.2f})" if name == "ours" else ""
            print(
                f"{one['shape']:<12} {one['attention']:<10} {name:<7} {times[1]:>9.1f} "
                f"{one['memory_bytes'][name] / 1e6:>7.0f} {ratio:>18}"
            )


def _norms(arguments: argparse.Namespace) -> None:
    from normexp.benchmarks.norms import measure

    result = measure(arguments.rounds, arguments.output, sys.stderr.isatty())
    print(f"{'shape':<16} {'dtype':<9} {'layer':<22} {'ms':>8} {'x nn.LayerNorm':>20}")
    for one in result["measured"]:
        low, median, high = one["ratio_to_layer_norm"]
        print(
            f"{one['shape']:<16} {one['dtype']:<9} {one['layer']:<22} {one['milliseconds']:>8.3f} "
            f"{median:>6.2f} ({low:.2f}-{high:.2f}){' disturbed' * one['disturbed']}"
        )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
