"""Explain why Hydra cannot compose a configuration from a command line.

Hydra answers every unknown key with the advice to add it by "+", which is right for those settings
of fairseq that configs/ does not name, and wrong for a typing error.
"""

import difflib
import os
import re
import shlex
from collections.abc import Sequence

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from normexp.config.declared_keys import declared_keys
from normexp.config.settings import first_line
from normexp.paths import CONFIGS

MOST_SUGGESTED = 3
_UNKNOWN_KEY = re.compile(r"Could not override '(?P<key>[^']+)'\.\nTo append to your config use \+")
_SWEPT = re.compile(r"Ambiguous value for argument '(?P<argument>.+)'\n")


def explained(error: HydraException, command: Sequence[str]) -> str:
    """Return the message of an error of composition, with a cure that is right.

    command: the script and its arguments, as in sys.argv.
    """
    if isinstance(error, MissingConfigException) and error.options:
        return _about_a_choice(error)
    if match := _UNKNOWN_KEY.match(str(error)):
        unknown = getattr(error.__cause__, "full_key", None) or match["key"]
        if unknown.startswith(f"{match['key']}."):  # one of a mapping's keys
            return (
                f"{match['key']} has no key {unknown.removeprefix(match['key'] + '.')}, which a "
                f"mapping cannot add: take it out and give it apart, +{unknown}=VALUE"
            )
        return _about_a_key(match["key"], command)
    if match := _SWEPT.match(str(error)):
        key, _, values = match["argument"].partition("=")
        script, *arguments = command
        return (
            f"{key}={values} are several runs, a sweep, and need -m: "
            f"{shlex.join(['python', script, '-m', *arguments])} (a list is {key}=[{values}])"
        )
    if isinstance(error, OverrideParseException):
        key, given, value = error.override.partition("=")
        if not given and not key.startswith("~"):
            return f"{key}: expected KEY=VALUE, such as norm=power (a switch is --NAME)"
        if value.startswith("~/"):
            return f"{error.override}: a path is given in full: {key}={os.path.expanduser(value)}"
        return (
            f"{error.override}: Hydra cannot read this value; a text with brackets, commas or "
            f"spaces is quoted twice: '{key}=\"{value}\"'"
        )
    message = str(error).strip()
    if isinstance(error.__cause__, OmegaConfBaseException):
        message += f": {first_line(error.__cause__)}"
    return " ".join(message.split())


def _about_a_choice(error: MissingConfigException) -> str:
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    near = difflib.get_close_matches(name, error.options, MOST_SUGGESTED)
    guess = f"; did you mean {_any_of([f'{group}={one}' for one in near])}?" if near else "."
    options = ", ".join(error.options)
    return f"{str(error).splitlines()[0]}{guess} Available options in '{group}': {options}"


def _about_a_key(key: str, command: Sequence[str]) -> str:
    config = _composed_without(key, command[1:])
    named = set(_named(config, ""))
    # fairseq takes seconds to import, and it knows no better what is meant by our own settings.
    ours = key.partition(".")[0] in config and not key.startswith("fairseq.")
    unnamed = set() if ours else set(declared_keys(config)) - named
    if key in unnamed:
        right = [re.sub(rf"^{re.escape(key)}=", f"+{key}=", argument) for argument in command]
        return (
            f"{key} is a setting of fairseq that configs/ does not name, and needs a +: "
            f"{shlex.join(['python', *right])}"
        )
    near = _nearest(key, named) or [f"+{one}" for one in _nearest(key, unnamed)]
    if near:
        return f"{key} is unknown; did you mean {_any_of(near)}?"
    parent = key.rpartition(".")[0]
    siblings = sorted(one for one in named if one.rpartition(".")[0] == parent)
    return f"{key} is unknown; known: {', '.join(siblings or map(str, config))}"


def _composed_without(key: str, arguments: Sequence[str]) -> DictConfig:
    """Compose what the arguments ask for without those that set this key."""
    given = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    GlobalHydra.instance().clear()  # what could not be composed is of no use any more
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        try:
            others = [
                f"{one.get_key_element()}={next(one.sweep_string_iterator())}"
                if one.is_discrete_sweep()
                else one.input_line
                for one in OverridesParser.create().parse_overrides(given)
                if one.key_or_group != key
            ]
            return compose("train", others, return_hydra_config=True)
        except HydraException:  # something else is wrong as well
            return compose("train", return_hydra_config=True)


def _named(node: DictConfig, prefix: str) -> list[str]:
    """Return all keys of a configuration, those of groups too."""
    keys = []
    for name in node:
        key = f"{prefix}{name}"
        keys.append(key)
        child = node._get_node(name)
        if isinstance(child, DictConfig) and not child._is_none():
            keys += _named(child, f"{key}.")
    return keys


def _nearest(key: str, known: set[str]) -> list[str]:
    """Return keys of the same last name, else those that are spelled alike, best first."""
    group, _, last = key.rpartition(".")
    same = sorted(one for one in known if one.rpartition(".")[2] == last)
    if same:
        return difflib.get_close_matches(key, same, MOST_SUGGESTED, cutoff=0)
    siblings = {name: one for one in known for at, _, name in [one.rpartition(".")] if at == group}
    alike = difflib.get_close_matches(last, sorted(siblings), MOST_SUGGESTED)
    if alike:
        return [siblings[name] for name in alike]
    return difflib.get_close_matches(key, sorted(known), MOST_SUGGESTED, cutoff=0.85)


def _any_of(names: Sequence[str]) -> str:
    return " or ".join(names)
