#!/usr/bin/env python
"""Train LN, BN, PN-V and PN on two toy tasks, two runs at a time.

    python scripts/demo.py
    python scripts/demo.py --results /tmp/demo

About 5 minutes on 2 cores. Interrupted, the same command goes on where it stopped. `make demo` also
prints the tables.
"""

import signal
import sys
from pathlib import Path

from normexp.config.command_grammar import Parser
from normexp.errors import exit_on_user_error
from normexp.sweeps.demo import run_demo


def main() -> int:
    """Parse the command line, train, evaluate."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--results", type=Path, default=Path("results/demo"), help="default: %(default)s"
    )
    return run_demo(parser.parse_args().results)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no run is left behind
    try:
        with exit_on_user_error():
            sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on where it stopped")
