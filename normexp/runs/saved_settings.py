"""Read the configuration of a run folder quickly: it is resolved, and OmegaConf is not needed.

OmegaConf's parser and its containers take some 25 ms for a file that libyaml reads in one.
"""

from pathlib import Path
from typing import Any

import yaml
from omegaconf._utils import get_yaml_loader

from normexp.config.settings import RunSettings, parse_resolved
from normexp.errors import UserError

_DAMAGE = (OSError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError)
_NOT_PLAIN = ("${", "???", "&", "!")
"""What references, missing values, anchors and tags of types begin with."""


def read_resolved(path: Path) -> RunSettings | None:
    """Return the settings in a file of plain values, or None where there are others or errors.

    What is returned is what `settings.parse` makes of OmegaConf's reading.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if any(mark in text for mark in _NOT_PLAIN):
            return None
        content = yaml.load(text, Loader=_LOADER)
        is_plain = isinstance(content, dict) and _is_plain(content)
        return parse_resolved(content) if is_plain else None
    except (UserError, yaml.YAMLError, *_DAMAGE):  # whoever reads it with OmegaConf says which
        return None


def _loader() -> type:
    """Return OmegaConf's loader, whose numbers differ from YAML's, over libyaml where that is."""
    rules = get_yaml_loader()
    if not yaml.__with_libyaml__:
        return rules

    class Loader(yaml.cyaml.CParser, rules):
        def __init__(self, stream: Any) -> None:
            yaml.cyaml.CParser.__init__(self, stream)
            yaml.constructor.SafeConstructor.__init__(self)
            yaml.resolver.Resolver.__init__(self)

    return Loader


_LOADER = _loader()


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_is_plain, value.values()))
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)
