"""Evaluate a run again from its folder and set the numbers beside those of its record."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from normexp import pipeline
from normexp.config import validation
from normexp.corpora import prepare
from normexp.errors import UserError
from normexp.paths import CONFIGS
from normexp.runs import records
from normexp.runs.folder import RunFolder

CHANGEABLE = ("evaluation.", "data.")
PRIMARY = CONFIGS / "train.yaml"

FOLD = {"fold=true": True, "fold=false": False}


def main(path: Path, overrides: list[str]) -> None:
    """Print the metrics of a run folder. Raises UserError for an unfit folder or override."""
    folder = RunFolder(path.absolute())
    fold = any(FOLD.get(override, False) for override in overrides)
    overrides = [override for override in overrides if override not in FOLD]
    cfg = _overridden(_with_newer_settings(folder.read_config()), overrides)
    validation.validate(cfg)
    local = Path(cfg.data.local) if cfg.data.local else None
    corpus = prepare(cfg.task.corpus, Path(cfg.data.dir), local)
    evaluated = pipeline.evaluate_run(cfg, folder, corpus, fold)
    recorded = records.read_record(folder.record).metrics if folder.record.is_file() else {}
    folded = ", norms folded" if fold else ""
    table = Table(title=f"{path} ({evaluated.checkpoint}{folded})")
    for column in ("split", "metric", "now", "record"):
        table.add_column(column, justify="left" if column in ("split", "metric") else "right")
    for split, values in evaluated.metrics.items():
        for name, value in values.items():
            table.add_row(split, name, _shown(value), _shown(recorded.get(split, {}).get(name)))
    Console().print(table)


def _with_newer_settings(cfg: DictConfig) -> DictConfig:
    """Settings of `evaluation` that came after the run get their defaults."""
    OmegaConf.set_struct(cfg, False)
    cfg.evaluation = OmegaConf.merge(OmegaConf.load(PRIMARY).evaluation, cfg.evaluation)
    return cfg


def _overridden(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    OmegaConf.set_struct(cfg, True)
    for override in overrides:
        if not override.startswith(CHANGEABLE) or "=" not in override:
            raise UserError(
                f"{override!r}: only evaluation.<key>=<value>, data.<key>=<value> and fold=true "
                "may follow the run folder; other settings belong to training"
            )
        try:
            cfg.merge_with_dotlist([override])
        except OmegaConfBaseException as error:
            raise UserError(f"{override!r}: {str(error).splitlines()[0]}") from None
    return cfg


def _shown(value: float | str | None) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value or "")
