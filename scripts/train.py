#!/usr/bin/env python
"""Train and evaluate: python scripts/train.py task=TASK norm=NORM seed=K (--help says more)."""

import os
import sys
import traceback

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from normexp.config import own_tasks
from normexp.config.departures import settings_of
from normexp.config.settings import RunSettings
from normexp.config.terminal import drop_output, say
from normexp.errors import UserError
from normexp.runs import records
from normexp.runs.lookup import already, find_finished
from normexp.runs.records import Record
from normexp.sweeps import slurm
from normexp.sweeps.objective import RunFailed, objective
from normexp.sweeps.unswept import refuse_unswept
from normexp.training import code_of_products, heap
from normexp.training.process_group import FailedOnMain, Process, this_process


@hydra.main(config_path="../configs", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> float | None:
    """Do one run and return what a sweep may minimize: see normexp/sweeps/objective.py.

    A run of a sweep that diverged or failed raises RunFailed; the others continue.
    """
    try:
        record = _run(cfg)
    except RunFailed:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise
        sys.exit(1)
    return record and objective(record)


def _run(cfg: DictConfig) -> Record | None:
    """Return the record of a complete run, None on a worker rank. Raises RunFailed."""
    try:
        process = this_process()
        settings = _settings(cfg, process)
        if process.size == 1 and (found := find_finished(settings)):
            path, record = found
            say(already(path))
        else:
            from normexp import pipeline  # here, because torch and fairseq take seconds

            heap.keep_freed()
            record = pipeline.run(settings)
    except UserError as error:
        if not isinstance(error, FailedOnMain):
            print(f"error: {error}", file=sys.stderr)
        raise RunFailed(str(error)) from None
    except Exception as error:  # a defect, which must not hide behind that of another run
        traceback.print_exc()
        raise RunFailed(f"{type(error).__name__}: {error}") from None
    if record is None:
        return None
    say(records.describe(record))
    if record.status != "complete":
        raise RunFailed(record.reason)
    return record


def _settings(cfg: DictConfig, process: Process) -> RunSettings:
    try:
        refuse_unswept(HydraConfig.get(), sys.argv[1:])
        settings = settings_of(cfg, HydraConfig.get().runtime.choices)
        own_tasks.require_current_corpus(settings)
        return settings
    except UserError:
        if process.is_main:
            raise
        raise FailedOnMain("the settings are invalid") from None  # rank 0 prints why


if __name__ == "__main__":
    slurm.register()
    code_of_products.keep_little()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints errors itself, with hints that mislead
    try:
        main()
    except RunFailed:
        sys.exit(1)
    except HydraException as error:
        from normexp.config.composition_errors import explained

        sys.exit(f"error: {explained(error, sys.argv)}")
    except BrokenPipeError:  # of --help, whose reader has seen enough
        drop_output()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command resumes from the last checkpoint")
