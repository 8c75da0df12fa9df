#!/usr/bin/env python
"""Causality test: does a language model see the tokens that it predicts?

    python scripts/audit.py results/own/runs/ptb/PN-seed1            # a run of this project
    python scripts/audit.py checkpoint_best.pt --data data-bin   # any language model of fairseq's

Changes the inputs after random positions and reports how much the predictions before them change,
and the perplexity with the future tokens visible, replaced at random, and hidden. The predictions
of a causal model do not change at all, and its three perplexities are equal. Exit status 2 says
that the model sees future tokens. The test of a run writes a record beside that of the run,
results/own/causality/<task>/<label>-seed<k>.json, from which scripts/report.py makes a table.
"""

import sys
from pathlib import Path

from normexp.config.command_grammar import Parser
from normexp.config.terminal import show_own_warnings
from normexp.errors import exit_on_user_error


def main() -> int:
    """Parse the command line, test, print; return 2 if the model sees future tokens."""
    parser = Parser(description=__doc__)
    parser.add_argument("model", type=Path, help="run folder, or checkpoint of a language model")
    parser.add_argument("--data", type=Path, help="binarized corpus; needed for a checkpoint")
    parser.add_argument("--user-dir", type=Path, help="fairseq plugin that the checkpoint needs")
    parser.add_argument("--split", default="test", help="(%(default)s)")
    parser.add_argument(
        "--segments", type=int, default=32, help="blocks drawn from the split (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (%(default)s)")
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    arguments = parser.parse_args()
    show_own_warnings()

    from normexp.evaluation import causality

    return 2 if causality.main(**vars(arguments)).sees_future else 0


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main())
