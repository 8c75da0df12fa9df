#!/usr/bin/env python
"""Pack the project for a machine with a GPU and without a network.

    python scripts/pack.py                        # normexp-gpu.tar.xz, for Python 3.12
    python scripts/pack.py --python 3.11 --output /tmp/packed.tar.xz

There, where Python has torch for CUDA, triton and sacrebleu:

    tar xf normexp-gpu.tar.xz && bash normexp-gpu/run.sh

which runs `python scripts/benchmark.py gpu` and writes its record to $OUT or normexp-gpu/results.
What is packed is what is committed, and wheels for Linux on x86-64.
"""

import logging
from pathlib import Path

from normexp.benchmarks.packing import NAME, pack
from normexp.config.command_grammar import Parser
from normexp.errors import exit_on_user_error


def main() -> None:
    """Parse the command line and pack."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--python", default="3.12", help="version of Python on that machine (%(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path(f"{NAME}.tar.xz"), help="file to write (%(default)s)"
    )
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("normexp.benchmarks").setLevel(logging.INFO)
    pack(arguments.output, arguments.python)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
