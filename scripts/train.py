#!/usr/bin/env python
"""Train and evaluate: python scripts/train.py task=TASK norm=NORM seed=K (--help says more)."""

import sys

import hydra
from omegaconf import DictConfig

from normexp.distributed import ToldByMain
from normexp.errors import UserError

failures = []


@hydra.main(config_path="../configs", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Do one run; in a sweep the other runs go on when one cannot."""
    from normexp import pipeline

    try:
        record = pipeline.run(cfg)
    except UserError as error:
        if not isinstance(error, ToldByMain):
            print(f"error: {error}", file=sys.stderr)
        failures.append(error)
        return
    if record is None:  # a rank that trained along
        return
    print(pipeline.describe(record), flush=True)
    if record.status != "complete":
        failures.append(record.reason)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from the last checkpoint")
    sys.exit(int(bool(failures)))
