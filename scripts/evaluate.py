#!/usr/bin/env python
"""Evaluate a finished run again, from its run folder.

    python scripts/evaluate.py results/own/runs/multi30k/PN-seed1
    python scripts/evaluate.py results/own/runs/multi30k/PN-seed1 evaluation.beam=1
    python scripts/evaluate.py results/own/runs/multi30k/PN-seed1 --fold
    python scripts/evaluate.py results/records/multi30k/PN-seed1.json

Prints the metrics beside those of the record. KEY=VALUE changes settings of the run's `evaluation`,
or `data.dir` and `data.local`. Nothing but the translations in hypotheses/ is written. With a
record instead of a run folder, BLEU is computed from its committed translations alone.
"""

from pathlib import Path

from normexp.config.command_grammar import Parser
from normexp.config.terminal import show_own_warnings
from normexp.errors import exit_on_user_error


def main() -> None:
    """Parse the command line, evaluate, print."""
    parser = Parser(description=__doc__)
    parser.add_argument("run_folder", type=Path, help="run folder, or record of a translation")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="such as evaluation.beam=1"
    )
    parser.add_argument(
        "--fold",
        action="store_true",
        help="merge the norms into the linear layers that follow them, where they are per-channel "
        "affine at inference",
    )
    arguments = parser.parse_intermixed_args()
    show_own_warnings()

    from normexp.evaluation import reevaluation

    reevaluation.main(arguments.run_folder, arguments.overrides, arguments.fold)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
