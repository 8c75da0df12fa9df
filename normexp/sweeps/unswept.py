"""An experiment that is a sweep, started without -m: Hydra would ignore its sweep."""

import math
import shlex
from collections.abc import Sequence

from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import OmegaConf

from normexp.errors import UserError


def refuse_unswept(hydra: HydraConf, arguments: Sequence[str]) -> None:
    """Raise UserError where a single run leaves open what its experiment sweeps over.

    hydra: Hydra's own configuration of the run. arguments: of the command line, for the message.
    """
    swept = OmegaConf.select(hydra, "sweeper.params") or {}
    if hydra.mode is RunMode.MULTIRUN or not swept:
        return
    parser = OverridesParser.create()
    given = {one.key_or_group for one in parser.parse_overrides([*hydra.overrides.task])}
    every = parser.parse_overrides([f"{key}={values}" for key, values in swept.items()])
    left = [one for one in every if one.key_or_group not in given]
    if not left:
        return
    number = math.prod(
        len([*one.sweep_string_iterator()]) for one in left if one.is_discrete_sweep()
    )
    experiment = OmegaConf.select(hydra, "runtime.choices.experiment")
    values = " ".join(one.input_line for one in left)
    keys = " ".join(f"{one.key_or_group}=..." for one in left)
    command = shlex.join(["python", "scripts/train.py", "-m", *arguments])
    raise UserError(
        f"+experiment={experiment} is a sweep of {number} runs ({values}); without -m only one "
        f"run would start. All of them: {command}; one of them: add {keys}"
    )
