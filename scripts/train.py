#!/usr/bin/env python
"""Train and evaluate: python scripts/train.py task=TASK norm=NORM seed=K (--help says more)."""

import sys

import hydra
from omegaconf import DictConfig

from normexp.errors import UserError
from normexp.runs import records
from normexp.sweeps import run_status, slurm
from normexp.training import process_group
from normexp.training.process_group import FailedOnMain

failures = []


@hydra.main(config_path="../configs", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> str | None:
    """Do one run and return why it failed; in a sweep the other runs go on when one cannot."""
    try:
        alone = process_group.this_process().size == 1
        if alone and (found := run_status.recorded(cfg)):
            path, record = found
            print(f"complete already: {path}")
        else:
            from normexp import pipeline  # here, because torch and fairseq take seconds

            record = pipeline.run(cfg)
    except UserError as error:
        if not isinstance(error, FailedOnMain):
            print(f"error: {error}", file=sys.stderr)
        failures.append(error)
        return str(error)
    if record is None:  # a rank that trained along
        return None
    print(records.describe(record), flush=True)
    if record.status != "complete":
        failures.append(record.reason)
        return record.reason
    return None


if __name__ == "__main__":
    slurm.register(failures)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from the last checkpoint")
    sys.exit(int(bool(failures)))
