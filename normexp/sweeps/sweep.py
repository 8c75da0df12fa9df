"""The runs of a sweep, expanded by Hydra's own rules."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.errors import HydraException
from omegaconf import DictConfig

from normexp.config.composition_errors import explained
from normexp.config.departures import Usual, settings_of
from normexp.config.identity import config_hash, differences
from normexp.config.settings import RunSettings
from normexp.errors import UserError
from normexp.runs.folder import RunFolder
from normexp.sweeps.composer import SweepComposer


def settings_or_error(
    cfg: DictConfig, choices: Mapping[str, str | None], overrides: Sequence[str], usual: Usual
) -> RunSettings | UserError:
    """Parse the settings of one run of a sweep; an error names its overrides, others can go on.

    choices: Hydra's `hydra.runtime.choices`. usual: shared by the runs.
    """
    try:
        return settings_of(cfg, choices, usual)
    except UserError as error:
        return UserError(f"{' '.join(overrides)}: {error}")


def runs_of_sweep(overrides: list[str]) -> list[RunSettings | UserError]:
    """Return every run that `train.py -m` with these overrides consists of: settings or error.

    Raises UserError for overrides that Hydra does not understand.
    """
    composer, usual = SweepComposer(), Usual()
    try:
        parsed = composer.parser.parse_overrides(overrides)
        fixed = [given.input_line for given in parsed if not given.is_sweep_override()]
        # An experiment's own sweep; what is given on the command line goes before it.
        swept = composer.composed(fixed).hydra.sweeper.params or {}
        every = [f"{key}={values}" for key, values in swept.items()] + overrides
        (jobs,) = BasicSweeper.split_arguments(composer.parser.parse_overrides(every), None)
        return [settings_or_error(*composer.run(job), job, usual) for job in jobs]
    except HydraException as error:
        raise UserError(explained(error, ["scripts/train.py", "-m", *overrides])) from error


def refuse_clashes(runs: Iterable[RunSettings]) -> None:
    """Raise UserError where two runs would leave their results under one name."""
    named: dict[tuple[str, str, int], RunSettings] = {}
    for settings in runs:
        name = settings.task.name, settings.label, settings.seed
        other = named.setdefault(name, settings)
        if config_hash(other) != config_hash(settings):
            task, label, seed = name
            raise UserError(
                f"two runs of this sweep are {task} {label} seed {seed} "
                f"({differences(other, settings)}): leave label= out, so that it follows the "
                "settings, or name them in it, as in label='${norm.label}-${seed}'"
            )


def runs_found(results_dir: Path) -> list[RunSettings | UserError]:
    """Return every run folder below RESULTS_DIR/runs/, moved here or not: settings or error.

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
