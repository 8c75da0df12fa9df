"""What decides the result of a run, out of everything that is configured.

Imports neither torch nor fairseq: what is done already should be found out at once.
"""

from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from normexp.errors import UserError
from normexp.training import process_group

# What may differ between two runs of the same experiment.
NOT_PART_OF_THE_EXPERIMENT = ("data", "results_dir", "run_dir", "tracking")


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain containers, references filled in, without Hydra's own node.

    Raises UserError where a reference leads nowhere or a value is missing.
    """
    try:
        own = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
        return OmegaConf.to_container(own, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"configuration: {first_line(error)}") from None


def experiment(cfg: DictConfig) -> dict[str, Any]:
    """What decides the result: the resolved configuration less paths and tracking."""
    plain = resolved(cfg)
    left_out = list(NOT_PART_OF_THE_EXPERIMENT)
    if process_group.settings(plain)["ranks"] == 1:  # with one rank it says nothing
        left_out.append("distributed")
    return {key: value for key, value in plain.items() if key not in left_out}


def differences(earlier: dict[str, Any], now: dict[str, Any]) -> str:
    """The first few keys in which two configurations differ, as 'key: old -> new'."""
    found = _differences(earlier, now, "")
    return ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")


def _differences(earlier: dict[str, Any], now: dict[str, Any], prefix: str) -> list[str]:
    found = []
    for key in sorted(set(earlier) | set(now)):
        a, b = earlier.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a} -> {b}")
    return found


def first_line(error: Exception) -> str:
    """The first line of one of OmegaConf's messages, with the key that it is about."""
    lines = str(error).strip().split("\n")
    key = next((line.split(":", 1)[1].strip() for line in lines if "full_key" in line), "")
    return lines[0] + (f" (key {key})" if key and key not in lines[0] else "")
