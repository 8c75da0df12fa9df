"""What a command changes in the configuration it names, and the run's name and mark made of it.

A command chooses a task, a norm and perhaps an experiment; together they are a configuration of
this project, to which the paper's or the committed numbers belong. Every setting that departs from
it becomes part of the run's label, so that runs of different settings have different names, and one
that shortens or shrinks the run becomes part of its budget. Imports neither torch nor fairseq.

    norm=power                                                  PN
    norm=power norm.options.alpha_fwd=0.8                       PN+alpha_fwd=0.8
    norm=power model=lm_ptb fairseq.optimization.lr=[0.01]      PN+model=lm_ptb+optimization.lr=0.01
    norm=power label=mine fairseq.optimization.lr=[0.01]        mine
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from normexp.config import own_tasks
from normexp.config.fairseq_values import in_one_form
from normexp.config.settings import ExperimentSettings, RunSettings, parse
from normexp.paths import CONFIGS

own_tasks.register()  # before anything composes

LONGEST_SUFFIX = 70
"""Characters that departures add to a label, which has to fit into names of files."""

_CONFIGURATION = ("task", "norm", "experiment")  # the groups whose choices make a configuration
_NAMED_OTHERWISE = ("label", "seed", "task.name")  # they are in the name already
_BY_ENVIRONMENT = {"speed.kernels": "auto", "distributed.ranks": 1}
"""Settings that configs/train.yaml takes from the environment, at the value without it."""

_NO_BUDGET = re.compile(
    r"norm\.|speed\.|seeding=|distributed\.|(task\.)?budget=(?!null )|task\.norm_warmup_steps="
    r"|evaluation\.(max_tokens|compound_split|context_window|stride|splits)="
    r"|fairseq\.(common|optimizer|lr_scheduler|criterion|ema|checkpoint\.(?!patience))"
    r"|fairseq\.optimization\.(lr|clip_norm)=|fairseq\.model\.\w*(\.\w+)*dropout"
    r"|fairseq\.dataset\.(num_workers|validate_interval)"
)
"""Departures that neither shorten nor shrink a run; after any other its numbers are those of
another budget, and tables keep them apart."""

_ABSENT = "(absent)"


@dataclass(frozen=True)
class Departure:
    """A setting, or a group's choice, and what it is in the configuration that was chosen."""

    key: str
    value: Any
    usual: Any

    def __str__(self) -> str:
        return f"{self.key}={_shown(self.value)} instead of {_shown(self.usual)}"


def settings_of(cfg: DictConfig, choices: Mapping[str, str | None]) -> RunSettings:
    """Return the settings of a configuration that Hydra has composed.

    choices: Hydra's `hydra.runtime.choices`, by group. A label that the command does not give is
    extended by the departures. Raises UserError as `parse` does.
    """
    parse(cfg)  # first: what follows takes valid settings for granted
    usual, chosen = _usual(choices)
    cfg = _in_form_of(usual, cfg)
    settings = parse(cfg)
    found = chosen + _departures(cfg, usual, settings.finetuned_from)
    # The norm's options first, which a label that is cut should not lose.
    found.sort(key=lambda one: (not one.key.startswith("norm."), one.key))
    raw_label = _raw(cfg, "label")
    named = cfg.copy()
    with open_dict(named):
        named.departures = [str(one) for one in found]
        if raw_label == _raw(usual, "label"):
            shown_already = set(re.findall(r"\$\{([\w.]+)\}", str(raw_label)))
            items = [one for one in found if one.key not in shown_already]
            named.label = settings.label + _suffix(items)
            if _raw(cfg, "run_dir") == _raw(usual, "run_dir"):
                # One training serves all evaluations of it.
                trained = [one for one in items if not one.key.startswith("evaluation.")]
                folder = settings.run_dir.parent
                name = f"{settings.label}{_suffix(trained)}-seed{settings.seed}"
                named.run_dir = str(folder / name)
    return parse(named)


def marked_budget(settings: RunSettings) -> str | None:
    """Return the budget with the departures that shorten or shrink the run; None without any."""
    marks = [one for one in settings.departures if not _NO_BUDGET.match(one)]
    return "; ".join([*([settings.budget] if settings.budget else []), *marks]) or None


def config_loader() -> ConfigLoader:
    """Return what reads configs/: Hydra's own where it runs, which may know further folders."""
    if GlobalHydra.instance().is_initialized():
        return GlobalHydra.instance().config_loader()
    return ConfigLoaderImpl(config_search_path=create_config_search_path(str(CONFIGS)))


def _usual(choices: Mapping[str, str | None]) -> tuple[DictConfig, list[Departure]]:
    """Return the configuration as it is without overrides, and the choices that depart from it."""
    loader = config_loader()
    kept = [
        f"{'+' if group == 'experiment' else ''}{group}={choices[group]}"
        for group in _CONFIGURATION
        if choices.get(group) is not None
    ]
    usual = loader.load_configuration("train", kept, run_mode=RunMode.RUN)
    usual_choices = usual.hydra.runtime.choices
    other = {
        group: choice
        for group, choice in choices.items()
        if not group.startswith("hydra/")
        and group not in (*_CONFIGURATION, "tracking")
        and usual_choices.get(group) != choice
    }
    if other:
        added = [f"{'' if g in usual_choices else '+'}{g}={c}" for g, c in other.items()]
        usual = loader.load_configuration("train", [*kept, *added], run_mode=RunMode.RUN)
    return usual, [Departure(key, choice, usual_choices.get(key)) for key, choice in other.items()]


def _in_form_of(usual: DictConfig, cfg: DictConfig) -> DictConfig:
    """Return a configuration with each number written as the one that it replaces is.

    A number that replaces none has no needless ".0". 1 and 1.0 are one setting, with one name.
    """
    formed = cfg.copy()
    before = _leaves(usual, resolve=True)
    for key, value in _leaves(cfg, resolve=False).items():
        form = _form(value, before.get(key))
        if repr(form) != repr(value) and OmegaConf.select(cfg, key) == value:
            OmegaConf.update(formed, key, form)
    return formed


def _form(value: Any, before: Any) -> Any:
    if type(value) is int and type(before) is float:
        return float(value)
    if type(value) is not float or not value.is_integer():
        return value
    return value + 0.0 if type(before) is float else int(value)  # + 0.0: -0.0 is 0.0


def _departures(cfg: DictConfig, usual: DictConfig, donor: str | None) -> list[Departure]:
    """Return the settings that are other than usual.

    donor: the checkpoint that the run begins with, which counts by its content and not its place.
    """
    found = []
    ours, theirs = _leaves(cfg, resolve=True), _leaves(usual, resolve=True) | _BY_ENVIRONMENT
    if ours.pop("fairseq.checkpoint.finetune_from_model", None) is not None:
        ours["finetuned_from"] = donor
    raw_ours, raw_theirs = _leaves(cfg, resolve=False), _leaves(usual, resolve=False)
    for key in sorted(ours.keys() | theirs.keys()):
        value, before = ours.get(key, _ABSENT), theirs.get(key, _ABSENT)
        raw = raw_ours.get(key)
        follows = isinstance(raw, str) and "${" in raw and raw == raw_theirs.get(key)
        if follows and key not in _BY_ENVIRONMENT:
            continue  # the setting that it refers to is listed
        if key not in _NAMED_OTHERWISE and _canonical(value) != _canonical(before):
            found.append(Departure(key, value, before))
    return found


def _leaves(cfg: DictConfig, resolve: bool) -> dict[str, Any]:
    """The settings that decide a result, by their dotted keys; a list is one value."""
    own = OmegaConf.masked_copy(cfg, [key for key in cfg if key in ExperimentSettings.model_fields])
    if resolve:
        # References may lead out of what is kept.
        whole = OmegaConf.to_container(
            OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"]), resolve=True
        )
        content = {key: whole[key] for key in own}
        content["fairseq"] = in_one_form(content["fairseq"])
    else:
        content = OmegaConf.to_container(own, resolve=False)
    leaves: dict[str, Any] = {}

    def walk(node: Any, key: str) -> None:
        if isinstance(node, Mapping):
            for name, value in node.items():
                walk(value, f"{key}.{name}".removeprefix("."))
        else:
            leaves[key] = node

    walk(content, "")
    return leaves


def _raw(cfg: DictConfig, key: str) -> Any:
    return OmegaConf.to_container(cfg, resolve=False)[key]


def _suffix(found: Iterable[Departure]) -> str:
    """Return "+key=value" for each departure; different departures give different suffixes.

    What does not fit, or has other characters than names of files may have, is replaced by a hash.
    """
    items = [_item(one) for one in found]
    whole = "".join(items)
    if len(whole) <= LONGEST_SUFFIX:
        return whole
    kept, length = 0, len("+others=") + 8
    while length + len(items[kept]) <= LONGEST_SUFFIX:
        length += len(items[kept])
        kept += 1
    return "".join(items[:kept]) + f"+others={_digest(items[kept:])}"


def _item(one: Departure) -> str:
    key = one.key.removeprefix("norm.options.").removeprefix("fairseq.")
    value = one.value
    if isinstance(value, list) and len(value) == 1:  # fairseq's lr, a list with mostly one entry
        value = value[0]
    word = value if isinstance(value, str) else json.dumps(value)
    plain = re.fullmatch(r"[A-Za-z0-9_.-]{1,24}", word) is not None
    if not plain or (isinstance(value, str) and _reads_as_json(word)):
        word = _digest(value)
    return f"+{key}={word}"


def _reads_as_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _digest(value: Any) -> str:
    return hashlib.sha256(_canonical(value).encode()).hexdigest()[:8]


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
