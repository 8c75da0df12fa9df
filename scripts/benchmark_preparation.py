#!/usr/bin/env python
"""Measure the preparation of WMT14 on made-up text: time and memory of every stage.

    python scripts/benchmark_preparation.py                  # a million pairs: half an hour
    python scripts/benchmark_preparation.py --pairs 10000 --output /tmp/preparation.json

Generates text with WMT14's lengths of sentences and words, prepares it as scripts/download.py
prepares `wmt14`, prints a line per stage and writes the record, with what it means for the 4.5
million pairs of the real corpus. Needs Linux and 2.5 GB of disk space per million pairs, which are
freed at the end.
"""

import argparse
import logging
import shutil
import sys
import tempfile
from pathlib import Path

from normexp.errors import UserError

RECORD = Path(__file__).resolve().parents[1] / "results" / "benchmarks" / "preparation.json"
_BYTES_PER_PAIR = 2500


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=1_000_000, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the text (%(default)s)")
    parser.add_argument("--folder", type=Path, help="for the text (a temporary folder)")
    parser.add_argument("--output", type=Path, default=RECORD, help="the record (%(default)s)")
    arguments = parser.parse_args()
    if arguments.pairs < 1000:
        parser.error("--pairs: at least 1000, or starting the processes is all that is measured")

    from normexp.corpora.benchmark import measure

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("normexp.corpora.benchmark").setLevel(logging.INFO)
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
        f"GB; {real['pairs']:,} pairs would take at most {real['hours_at_most']:.1f} hours. "
        f"Record: {arguments.output}"
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
