"""What a command changes in the configuration it names, and the run's name and mark made of it.

A command chooses a task, a norm and perhaps an experiment; together they are a configuration of
this project, to which the paper's or the committed numbers belong. Every setting that departs from
it becomes part of the run's label, so that runs of different settings have different names, and one
that shortens or shrinks the run becomes part of its budget. Imports neither torch nor fairseq.

    norm=power                                                  PN
    norm=power norm.options.alpha_fwd=0.8                       PN+alpha_fwd=0.8
    norm=power model=lm_ptb fairseq.optimization.lr=[0.01]      PN+model=lm_ptb+optimization.lr=0.01
    norm=power label=mine fairseq.optimization.lr=[0.01]        mine
    norm=power task=NAME_OF_AN_OWN_CORPUS                       PN+corpus=e7d7bb18
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
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from normexp.config import own_tasks
from normexp.config.fairseq_values import in_one_form
from normexp.config.settings import (
    ExperimentSettings,
    RunSettings,
    parse_resolved,
    resolved,
    without_hydra,
)
from normexp.errors import UserError
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


class Usual:
    """The configurations that commands depart from, each composed once.

    One object serves one sweep: what it has composed does not follow the files and the environment.
    """

    def __init__(self) -> None:
        self._known: dict[tuple, _Composed] = {}

    def of(self, choices: Mapping[str, str | None]) -> tuple["_Composed", list[Departure]]:
        """Return the configuration of these choices without overrides, and the choices that depart.

        choices: Hydra's `hydra.runtime.choices`, by group.
        """
        kept = [
            f"{'+' if group == 'experiment' else ''}{group}={choices[group]}"
            for group in _CONFIGURATION
            if choices.get(group) is not None
        ]
        usual = self._composed(kept)
        other = {
            group: choice
            for group, choice in choices.items()
            if not group.startswith("hydra/")
            and group not in (*_CONFIGURATION, "tracking")
            and usual.choices.get(group) != choice
        }
        found = [Departure(key, choice, usual.choices.get(key)) for key, choice in other.items()]
        if other:
            added = [f"{'' if g in usual.choices else '+'}{g}={c}" for g, c in other.items()]
            usual = self._composed([*kept, *added])
        return usual, found

    def _composed(self, overrides: list[str]) -> "_Composed":
        key = tuple(overrides)
        if key not in self._known:
            cfg = config_loader().load_configuration("train", overrides, run_mode=RunMode.RUN)
            self._known[key] = _Composed(cfg, dict(cfg.hydra.runtime.choices))
        return self._known[key]


class _Composed:
    """A configuration without overrides, as values by dotted key."""

    def __init__(self, cfg: DictConfig, choices: Mapping[str, str | None]) -> None:
        own = without_hydra(cfg)
        self.choices = choices
        self._swept = {**(cfg.hydra.sweeper.get("params") or {})}
        self.raw = OmegaConf.to_container(own, resolve=False)
        self.raw_values = _leaves(self.raw, raw=True)
        self.values = _leaves(OmegaConf.to_container(own, resolve=True)) | _BY_ENVIRONMENT

    def has_arm(self, departure: Departure) -> bool:
        """Whether the experiment itself sweeps over this setting, this value among others."""
        if departure.key not in self._swept:
            return False
        arms = OverridesParser.create().parse_override(
            f"{departure.key}={self._swept[departure.key]}"
        )
        values = list(arms.sweep_iterator()) if arms.is_sweep_override() else [arms.value()]
        return departure.value in values


def settings_of(
    cfg: DictConfig, choices: Mapping[str, str | None], usual: Usual | None = None
) -> RunSettings:
    """Return the settings of a configuration that Hydra has composed.

    choices: Hydra's `hydra.runtime.choices`, by group. usual: shared by the runs of a sweep. A
    label that the command does not give is extended by the departures. Raises UserError as `parse`
    does.
    """
    own = without_hydra(cfg)
    content = resolved(own)
    settings = parse_resolved(content)  # first: what follows takes valid settings for granted
    _refuse_merged(choices)
    named, found = (usual or Usual()).of(choices)
    _refuse_other_norm(settings.norm.name, named.values["norm.name"])
    if _take_the_form_of(named, own):
        content = resolved(own)
        settings = parse_resolved(content)
    raw = OmegaConf.to_container(own, resolve=False)
    found += _changed(content, raw, named, settings.finetuned_from)
    # The norm's options first, which a label that is cut should not lose.
    found.sort(key=lambda one: (not one.key.startswith("norm."), one.key))
    names: dict[str, Any] = {}
    if raw["label"] == named.raw["label"]:
        shown_already = set(re.findall(r"\$\{([\w.]+)\}", str(raw["label"])))
        items = [one for one in found if one.key not in shown_already]
        stem = settings.label + _version(settings.task.corpus)
        names["label"] = stem + _suffix(items)
        if raw["run_dir"] == named.raw["run_dir"]:
            # One training serves all evaluations of it.
            trained = [one for one in items if not one.key.startswith("evaluation.")]
            name = f"{stem}{_suffix(trained)}-seed{settings.seed}"
            names["run_dir"] = str(settings.run_dir.parent / name)
    departures = [str(one) for one in found if not named.has_arm(one)]
    if all(str(getattr(settings, key)) == value for key, value in names.items()):
        return settings.model_copy(update={"departures": departures})
    with open_dict(own):  # other settings may refer to the names
        own.merge_with({**names, "departures": departures})
    return parse_resolved(resolved(own))


def _version(corpus: str) -> str:
    """Return what tells runs on an own corpus, NAME@DIGEST, from those on another text of it."""
    _, _, digest = corpus.partition("@")
    return f"+corpus={digest[:8]}" if re.fullmatch(r"[0-9a-f]{8,}", digest) else ""


def _refuse_merged(choices: Mapping[str, str | None]) -> None:
    """Raise UserError for norm=[a,b], which Hydra takes for one choice, made of both."""
    for group in ("task", "model", "norm"):
        if choices.get(group) is None:  # so Hydra notes a list
            raise UserError(
                f"{group}=[A,B] would be one run, of the settings of both; one run for each is a "
                f"sweep: -m {group}=A,B"
            )


def _refuse_other_norm(name: str, usual: str) -> None:
    """Raise UserError for norm.name=NAME, by which a norm would have another's label and options.

    A name that is none of a norm's is refused later, with those that are.
    """
    if name != usual and name in config_loader().get_group_options("norm"):
        raise UserError(
            f"norm.name={name}: label and options are those of {usual}; choose the norm by "
            f"norm={name}"
        )


def marked_budget(settings: RunSettings) -> str | None:
    """Return the budget with the departures that shorten or shrink the run; None without any."""
    marks = [one for one in settings.departures if not _NO_BUDGET.match(one)]
    return "; ".join([*([settings.budget] if settings.budget else []), *marks]) or None


def config_loader() -> ConfigLoader:
    """Return what reads configs/: Hydra's own where it runs, which may know further folders."""
    if GlobalHydra.instance().is_initialized():
        return GlobalHydra.instance().config_loader()
    return ConfigLoaderImpl(config_search_path=create_config_search_path(str(CONFIGS)))


def _take_the_form_of(usual: _Composed, cfg: DictConfig) -> bool:
    """Write each number as the one that it replaces is; return whether any was written otherwise.

    A number that replaces none has no needless ".0". 1 and 1.0 are one setting, with one name.
    """
    changed = False
    for key, value in _leaves(OmegaConf.to_container(cfg, resolve=False), raw=True).items():
        form = _form(value, usual.values.get(key))
        if repr(form) != repr(value) and OmegaConf.select(cfg, key) == value:
            OmegaConf.update(cfg, key, form)
            changed = True
    return changed


def _form(value: Any, before: Any) -> Any:
    if type(value) is int and type(before) is float:
        return float(value)
    if type(value) is not float or not value.is_integer():
        return value
    return value + 0.0 if type(before) is float else int(value)  # + 0.0: -0.0 is 0.0


def _changed(
    content: dict[str, Any], raw: dict[str, Any], usual: _Composed, donor: str | None
) -> list[Departure]:
    """Return the settings that are other than usual.

    content, raw: the configuration with its references filled in, and with them. donor: the
    checkpoint that the run begins with, which counts by its content and not its place.
    """
    ours, raw_ours, raw_theirs = _leaves(content), _leaves(raw, raw=True), usual.raw_values
    if ours.pop("fairseq.checkpoint.finetune_from_model", None) is not None:
        ours["finetuned_from"] = donor
    found = []
    for key in sorted(ours.keys() | usual.values.keys()):
        value, before = ours.get(key, _ABSENT), usual.values.get(key, _ABSENT)
        unresolved = raw_ours.get(key)
        follows = isinstance(unresolved, str) and "${" in unresolved
        if follows and unresolved == raw_theirs.get(key) and key not in _BY_ENVIRONMENT:
            continue  # the setting that it refers to is listed
        if key not in _NAMED_OTHERWISE and _canonical(value) != _canonical(before):
            found.append(Departure(key, value, before))
    return found


def _leaves(content: Mapping[str, Any], raw: bool = False) -> dict[str, Any]:
    """Return the settings that decide a result, by their dotted keys; a list is one value.

    raw: with references, so that values are not brought into one form.
    """
    own = {key: value for key, value in content.items() if key in ExperimentSettings.model_fields}
    if not raw:
        own["fairseq"] = in_one_form(own["fairseq"])
    leaves: dict[str, Any] = {}

    def walk(node: Any, key: str) -> None:
        if isinstance(node, Mapping):
            for name, value in node.items():
                walk(value, f"{key}.{name}".removeprefix("."))
        else:
            leaves[key] = node

    walk(own, "")
    return leaves


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
