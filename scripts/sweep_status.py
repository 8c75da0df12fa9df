#!/usr/bin/env python
"""Print the status of every run of a sweep.

    python scripts/sweep_status.py +experiment=table1_iwslt14 norm=layer,power seed=1,2,3
    python scripts/sweep_status.py                      # every run found below results/own/runs/
    python scripts/sweep_status.py results_dir=/scratch/results

Takes the overrides of `scripts/train.py -m`; nothing is started or changed.

  done         its record is there, made with this configuration
  diverged     likewise: a loss was not finite, which is a result and is not repeated
  running      a process holds its run folder: last update, and when it was logged
  waiting      its SLURM job has not started
  failed       an attempt ended with an error: the reason; the same command tries again
  interrupted  begun, and no process works on it: the same command resumes from its last checkpoint
  missing      not begun, or begun with another configuration

Exit status 0 if every run is done or diverged, 3 if any is not, 1 after an error: then runs whose
settings are invalid are listed below the table.
"""

import sys
from pathlib import Path

from normexp.config.command_grammar import Parser
from normexp.errors import UserError, exit_on_user_error
from normexp.paths import OWN_RESULTS
from normexp.sweeps import slurm_queue
from normexp.sweeps.run_status import status_of
from normexp.sweeps.status_table import print_statuses
from normexp.sweeps.sweep import runs_found, runs_of_sweep

UNFINISHED = 3


def main() -> int:
    """Parse the command line, look, print."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "-m", "--multirun", action="store_true", help="as for train.py; may be left out"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for train.py")
    overrides = parser.parse_intermixed_args().overrides
    results = None
    if all(override.startswith("results_dir=") for override in overrides):
        results = Path(overrides[-1].partition("=")[2] if overrides else OWN_RESULTS)
        found = runs_found(results)
    else:
        found = runs_of_sweep(overrides)
    runs = [run for run in found if not isinstance(run, UserError)]
    invalid = [run for run in found if isinstance(run, UserError)]
    jobs = slurm_queue.jobs(results or (runs[0].results_dir if runs else OWN_RESULTS))
    statuses = [status_of(settings, jobs, from_folder=results is not None) for settings in runs]
    print_statuses(statuses)
    for error in invalid:
        print(f"error: {error}", file=sys.stderr)
    if invalid:
        return 1
    return 0 if all(status.finished for status in statuses) else UNFINISHED


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main())
