"""What is checked before the first run of a sweep starts; Hydra calls it."""

import sys
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from normexp.config.settings import RunSettings
from normexp.errors import UserError
from normexp.sweeps.sweep import refuse_clashes, runs_of_sweep


class BeforeSweep(Callback):
    """Ends a sweep whose runs would have one name, with status 1."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Compose all runs; only those of Hydra's own sweeper are known before it starts."""
        if not config.hydra.sweeper._target_.endswith(".BasicSweeper"):
            return
        try:
            # As they were typed: read one by one, their references would be resolved.
            given = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
            runs = runs_of_sweep(given)
        except UserError:
            return  # Hydra says why
        try:
            refuse_clashes(run for run in runs if isinstance(run, RunSettings))
        except UserError as error:
            sys.exit(f"error: {error}")  # another exception would be a warning to Hydra
