#!/usr/bin/env python
"""Make finished runs evidence: copy their records and translations among the committed results.

    python scripts/promote.py results/own/runs/multi30k/PN-seed1
    python scripts/promote.py results/own/causality/ptb/PN-seed1.json
    python scripts/promote.py results/own/benchmarks/norms.json --replace
    python scripts/report.py --results results      # then the tables are made anew

A run is checked before: it has ended and was made by committed code, the corpus has the hashes in
the record, and the translations have its BLEU. Nothing committed is replaced without --replace.
"""

import sys
from pathlib import Path

from normexp.config.command_grammar import Parser
from normexp.config.terminal import show_own_warnings
from normexp.errors import UserError, exit_on_user_error
from normexp.paths import RESULTS


def main() -> int:
    """Parse the command line and copy; return 1 if something was refused."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="run folder, or record of another kind"
    )
    parser.add_argument("--replace", action="store_true", help="also what is committed already")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="the committed results (%(default)s)"
    )
    arguments = parser.parse_args()
    show_own_warnings()

    from normexp.evaluation.promotion import promote  # here, because torch takes a second

    refused = False
    for path in arguments.paths:
        try:
            for written in promote(path, arguments.results, arguments.replace):
                print(f"written: {written}")
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            refused = True
    return int(refused)


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main())
