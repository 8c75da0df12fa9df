"""The runs of a sweep, expanded by Hydra's own rules."""

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

from normexp.config.settings import RunSettings, parse
from normexp.errors import UserError
from normexp.paths import CONFIGS
from normexp.runs.folder import RunFolder


def settings_or_error(cfg: DictConfig, overrides: Sequence[str]) -> RunSettings | UserError:
    """Parse the settings of one run of a sweep; an error names its overrides, others can go on."""
    try:
        return parse(cfg)
    except UserError as error:
        return UserError(f"{' '.join(overrides)}: {error}")


def runs_of_sweep(overrides: list[str]) -> list[RunSettings | UserError]:
    """Return every run that `train.py -m` with these overrides consists of: settings or error.

    Raises UserError for overrides that Hydra does not understand.
    """
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            parser = OverridesParser.create()
            fixed = [
                given.input_line
                for given in parser.parse_overrides(overrides)
                if not given.is_sweep_override()
            ]
            # An experiment's own sweep; what is given on the command line goes before it.
            swept = compose("train", fixed, return_hydra_config=True).hydra.sweeper.params or {}
            every = [f"{key}={values}" for key, values in swept.items()] + overrides
            (jobs,) = BasicSweeper.split_arguments(parser.parse_overrides(every), None)
            return [settings_or_error(compose("train", job), job) for job in jobs]
    except HydraException as error:
        raise UserError(" ".join(str(error).split())) from error


def runs_found(results_dir: Path) -> list[RunSettings | UserError]:
    """Return every run folder below results/runs/, moved here or not: settings or error.

    Raises UserError where there is none.
    """
    found: list[RunSettings | UserError] = []
    for path in sorted((results_dir / "runs").glob("*/*/config.yaml")):
        here = {"results_dir": results_dir, "run_dir": path.parent}
        try:
            found.append(RunFolder(path.parent).read_settings().model_copy(update=here))
        except UserError as error:
            found.append(error)
    if not found:
        raise UserError(f"no run folders below {results_dir}/runs; name a sweep or results_dir=...")
    return found
