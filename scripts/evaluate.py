#!/usr/bin/env python
"""Evaluate a finished run again, from its run folder.

    python scripts/evaluate.py results/runs/multi30k/PN-seed1
    python scripts/evaluate.py results/runs/multi30k/PN-seed1 evaluation.beam=1
    python scripts/evaluate.py results/runs/multi30k/PN-seed1 fold=true

Prints the metrics beside those of the record. Overrides of the run's `evaluation` settings and of
`data.dir` and `data.local` may follow; fold=true merges the norms into the linear layers that
follow them, where they are per-channel affine at inference. Nothing but the translations in
hypotheses/ is written.
"""

import argparse
import sys
from pathlib import Path

from normexp.errors import UserError


def main() -> None:
    """Parse the command line, evaluate, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_folder", type=Path, help="results/runs/<task>/<label>-seed<k>")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as fold=true")
    arguments = parser.parse_args()

    from normexp.evaluation import reevaluation

    reevaluation.main(arguments.run_folder, arguments.overrides)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
