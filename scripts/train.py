#!/usr/bin/env python
"""Train and evaluate: python scripts/train.py task=TASK norm=NORM seed=K (--help says more)."""

import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from normexp.config import own_tasks
from normexp.config.departures import settings_of
from normexp.config.settings import RunSettings
from normexp.errors import UserError
from normexp.runs import records
from normexp.runs.lookup import already, find_finished
from normexp.sweeps import slurm
from normexp.training.process_group import FailedOnMain, Process, this_process

failures = []


@hydra.main(config_path="../configs", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> str | None:
    """Do one run and return why it failed; the other runs of a sweep continue."""
    try:
        process = this_process()
        settings = _settings(cfg, process)
        if process.size == 1 and (found := find_finished(settings)):
            path, record = found
            print(already(path))
        else:
            from normexp import pipeline  # here, because torch and fairseq take seconds

            record = pipeline.run(settings)
    except UserError as error:
        if not isinstance(error, FailedOnMain):
            print(f"error: {error}", file=sys.stderr)
        failures.append(error)
        return str(error)
    if record is None:  # a worker rank
        return None
    print(records.describe(record), flush=True)
    if record.status != "complete":
        failures.append(record.reason)
        return record.reason
    return None


def _settings(cfg: DictConfig, process: Process) -> RunSettings:
    try:
        settings = settings_of(cfg, HydraConfig.get().runtime.choices)
        own_tasks.require_current_corpus(settings)
        return settings
    except UserError:
        if process.is_main:
            raise
        raise FailedOnMain("the settings are invalid") from None  # rank 0 prints why


if __name__ == "__main__":
    slurm.register(failures)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command resumes from the last checkpoint")
    sys.exit(int(bool(failures)))
