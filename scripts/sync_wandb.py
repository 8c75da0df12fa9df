#!/usr/bin/env python
"""Upload the offline W&B runs, except for what is uploaded already.

    python scripts/sync_wandb.py                                  # all below results/own/runs
    python scripts/sync_wandb.py results/own/runs/ptb /scratch/runs   # these only
    python scripts/sync_wandb.py --dry-run                        # show what would be uploaded

Runs that are still being written are left for the next call, and so are failed or interrupted
uploads.
"""

import sys
from pathlib import Path

from normexp.config.command_grammar import Parser
from normexp.errors import UserError, exit_on_user_error
from normexp.paths import OWN_RESULTS
from normexp.tracking.offline import UploadError, check_connection, find_offline_runs, upload

RUNS = OWN_RESULTS / "runs"


def main() -> None:
    """Find the runs and upload their parts, one by one."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "paths", nargs="*", type=Path, help=f"run folders, or folders that hold some ({RUNS})"
    )
    parser.add_argument("--dry-run", action="store_true", help="upload nothing, show what would be")
    options = parser.parse_args()
    if not options.paths and not RUNS.is_dir():
        raise UserError(f"no runs below {RUNS} yet; train something first, or name folders")

    found = find_offline_runs(options.paths or [RUNS])
    busy = [run for run in found if run.is_being_written]
    runs = [run for run in found if run not in busy and run.waiting]
    for run in busy:
        print(f"{run.name}: still being written, left for the next call")
    total = sum(len(run.waiting) for run in runs)
    print(f"{total} parts of {len(runs)} runs to upload; {len(found)} runs found")
    if runs and not options.dry_run:
        check_connection()
    done, failed = 0, []
    for run in runs:
        for log in run.waiting:
            done += 1
            head = f"[{done}/{total}] {run.name}, part {run.logs.index(log) + 1} of {len(run.logs)}"
            if options.dry_run:
                print(f"{head}: {log.parent}")
                continue
            try:
                upload(log)
            except UploadError as error:
                print(f"{head}: not uploaded ({error})", file=sys.stderr)
                failed.append(run.name)
                check_connection()  # without a network the others would fail as slowly
                break  # later parts of this run have to wait for this one
            print(f"{head}: uploaded", flush=True)
    if failed:
        raise UserError(f"not uploaded: {', '.join(failed)}; the same command tries again")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
