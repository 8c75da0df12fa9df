"""The command that makes one run, also where the run is one of a sweep or a job of a cluster."""

import sys

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode


def command_of_this_run() -> list[str]:
    """Script and arguments; of a run in a sweep those for this run alone."""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        return ["scripts/train.py", *HydraConfig.get().overrides.task]
    return sys.argv
