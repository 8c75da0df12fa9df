"""The decisions of fairseq_keys.yaml: what each key of fairseq's configuration may be here.

A key that is forbidden, or that the file does not know, may have fairseq's own default only, so a
new version of fairseq brings no key that nobody has thought about.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict

from normexp.errors import UserError

DECISIONS = Path(__file__).with_suffix(".yaml")
COMPONENTS = ("model", "task", "criterion", "optimizer", "lr_scheduler")
"""Groups whose keys depend on the component that their `_name` chooses."""
ALL = "*"


class Decision(BaseModel):
    """What some keys of one group may be; see the head of fairseq_keys.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    decision: Literal["allowed", "forbidden", "set"]
    keys: tuple[str, ...]
    reason: str = ""
    note: str = ""
    value: Any = None
    at_least: float | None = None
    at_most: float | None = None
    below: float | None = None
    one_of: tuple[str, ...] | None = None
    length: int | None = None

    def limits(self, value: Any) -> str | None:
        """Return in words what the value should be, None where it is that already."""
        entries = value if isinstance(value, list) else [value]
        if self.length is not None and len(entries) != self.length:
            return f"it must have {self.length} {'entries' if self.length > 1 else 'entry'}"
        if isinstance(value, list) and not value:
            return "it must have an entry"
        if self.one_of is not None and str(value) not in self.one_of:
            return f"it must be one of {', '.join(self.one_of)}"
        for number in (n for n in entries if isinstance(n, int | float)):
            if self.at_least is not None and not number >= self.at_least:
                return f"it must be at least {self.at_least:g}"
            if self.at_most is not None and not number <= self.at_most:
                return f"it must be at most {self.at_most:g}"
            if self.below is not None and not number < self.below:
                return f"it must be below {self.below:g}"
            if not math.isfinite(number):
                return "it must be finite"
        return None


@functools.cache
def decisions() -> dict[str, dict[str, Decision]]:
    """Return section -> key -> decision.

    A section is a group of fairseq's configuration, or "GROUP.NAME" for a component.
    """
    content = yaml.safe_load(DECISIONS.read_text(encoding="utf-8"))
    sections: dict[str, dict[str, Decision]] = {}
    for group, body in content.items():
        named = (
            {f"{group}.{name}": items for name, items in body.items()}
            if (group in COMPONENTS)
            else {group: body}
        )
        for section, items in named.items():
            sections[section] = {}
            for item in items:
                if "like" in item:
                    sections[section].update(sections[f"{group}.{item['like']}"])
                    continue
                decision = Decision.model_validate(item)
                sections[section].update(dict.fromkeys(decision.keys, decision))
    return sections


def check_components(given: Mapping[str, Any]) -> None:
    """Raise UserError for a component that the decisions refuse, or that only fairseq knows.

    given: fairseq's groups and keys as the user sets them.
    """
    for group, registry in registries().items():
        name = given[group].get("_name")
        if not isinstance(name, str | None):
            raise UserError(f"fairseq.{group}._name={name!r} must be a name")
        known = decisions().get(f"{group}.{name}")
        if name not in registry or (known is not None and ALL not in known):
            continue
        allowed = [
            section.removeprefix(f"{group}.")
            for section, keys in decisions().items()
            if section.startswith(f"{group}.") and ALL not in keys
        ]
        reason = known[ALL].reason if known else "normexp does not know it"
        raise UserError(
            f"fairseq.{group}._name={name} is not allowed: {reason} (allowed: {', '.join(allowed)})"
        )


def check_keys(given: Mapping[str, Any], complete: DictConfig) -> None:
    """Raise UserError for the first value that the decisions refuse, with reason and cure.

    given: fairseq's groups and keys as the user sets them. complete: all of fairseq's configuration
    with them, typed, the groups of `COMPONENTS` too.
    """
    for group, values in given.items():
        if values is None:
            continue
        if not isinstance(values, Mapping):  # a name, where fairseq takes anything
            values = {"_name": values}
        name = values.get("_name")
        known = decisions().get(f"{group}.{name}" if group in COMPONENTS else group, {})
        if group not in COMPONENTS and name is not None:
            reason = known[ALL].reason if ALL in known else "leave it out"
            raise UserError(f"fairseq.{group}={name} is not allowed: {reason}")
        for key in _leaves(values):
            _check_key(known.get(key) or known.get(ALL), group, key, complete)


def set_values() -> dict[str, Any]:
    """Return dotted key -> value of the keys that normexp sets whatever the user says."""
    return {
        f"{section}.{key}": decision.value
        for section, keys in decisions().items()
        for key, decision in keys.items()
        if decision.decision == "set"
    }


def _check_key(decision: Decision | None, group: str, key: str, complete: DictConfig) -> None:
    path = f"{group}.{key}"
    value = _plain(complete, path)
    if decision is not None and decision.decision == "allowed":
        if value is not None and (wanted := decision.limits(value)):
            note = f" ({decision.note})" if decision.note else ""
            raise UserError(f"fairseq.{path}={_shown(value)} is not allowed: {wanted}{note}")
        return
    is_set = decision is not None and decision.decision == "set"
    wanted = decision.value if is_set else _default(group, key, complete)
    if value != wanted:
        reason = (
            decision.reason if decision else "normexp has no decision about this key; leave it out"
        )
        raise UserError(
            f"fairseq.{path}={_shown(value)} is not allowed (must be {_shown(wanted)}): {reason}"
        )


def _default(group: str, key: str, complete: DictConfig) -> Any:
    """Return fairseq's default of a key; where it is another key's value, that one's."""
    node = OmegaConf.structured(_dataclass(group, complete))
    *parents, last = key.split(".")
    for parent in parents:
        node = node[parent]
    raw = OmegaConf.to_container(node, resolve=False)[last]
    if isinstance(raw, str) and raw.startswith("${"):
        return _plain(complete, raw[2:-1])
    return _plain(node, last)


def _dataclass(group: str, complete: DictConfig) -> type:
    from fairseq.dataclass.configs import FairseqConfig

    if group in COMPONENTS:
        return registries()[group][complete[group]["_name"]]
    return FairseqConfig.__dataclass_fields__[group].type


def _plain(config: DictConfig, path: str) -> Any:
    try:
        value = OmegaConf.select(config, path)
    except OmegaConfBaseException:  # "???"
        return None
    return (
        OmegaConf.to_container(value, enum_to_str=True) if isinstance(value, Container) else value
    )


def _shown(value: Any) -> str:
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if key == "_name":
            continue
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def registries() -> dict[str, dict[str, type]]:
    """Return group -> name -> fairseq's dataclass, for the groups of `COMPONENTS`."""
    import fairseq.criterions
    import fairseq.optim
    import fairseq.optim.lr_scheduler
    import fairseq.tasks
    from fairseq.models import MODEL_DATACLASS_REGISTRY
    from fairseq.registry import REGISTRIES

    import normexp.fairseq_plugin  # noqa: F401 (registers its components)

    return {
        "model": MODEL_DATACLASS_REGISTRY,
        "task": fairseq.tasks.TASK_DATACLASS_REGISTRY,
        **{
            group: REGISTRIES[group]["dataclass_registry"]
            for group in ("criterion", "optimizer", "lr_scheduler")
        },
    }
