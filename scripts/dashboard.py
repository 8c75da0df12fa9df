#!/usr/bin/env python
"""Make the W&B dashboard: a saved workspace, and the table of results.

    python scripts/dashboard.py workspace              # panels that compare norms, seeds as band
    python scripts/dashboard.py workspace --task ptb   # of one task
    python scripts/dashboard.py table                  # the committed records, in the run "results"

The workspace is saved online. The table is written to disk for scripts/sync_wandb.py where there is
no account or no network.
"""

import logging
from pathlib import Path

from normexp.config.command_grammar import Parser
from normexp.errors import exit_on_user_error
from normexp.paths import RESULTS


def main() -> None:
    """Parse the command line and make the workspace or the table."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    workspace = commands.add_parser("workspace", help="save the panels at W&B")
    workspace.add_argument("--entity", help="user or team at W&B (that of the key)")
    workspace.add_argument("--task", help="show the runs of one task only")
    table = commands.add_parser("table", help="log the records as a table")
    table.add_argument("--results", type=Path, default=RESULTS, help="(%(default)s)")
    for command in (workspace, table):
        command.add_argument("--project", default="normexp", help="at W&B (%(default)s)")
    options = parser.parse_args()

    # Here, because W&B and torch take seconds to load, and --help should not.
    from normexp.tracking import dashboard

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("normexp.tracking.tracker").setLevel(logging.INFO)
    if options.command == "workspace":
        print(dashboard.save_workspace(options.entity, options.project, options.task))
    else:
        num_rows = dashboard.log_results(options.results, options.project)
        print(f"{num_rows} rows logged")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
