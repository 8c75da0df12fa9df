"""fairseq architectures (--arch normexp_<stem>) made from configs/model/<stem>.yaml.

The YAML files are the only place for the values; the Hydra scripts read them too.
"""

import argparse
import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from fairseq.dataclass import FairseqDataclass
from fairseq.models import (
    ARCH_CONFIG_REGISTRY,
    MODEL_DATACLASS_REGISTRY,
    register_model_architecture,
)
from omegaconf import DictConfig, OmegaConf

from normexp.paths import CONFIGS

PRESETS = CONFIGS / "model"
PREFIX = "normexp_"


def register_architectures(folder: Path = PRESETS) -> None:
    """Register an architecture for every preset of this plugin's models in the folder.

    An installed wheel has no configs folder and offers the models without presets only.
    """
    models = [name for name in MODEL_DATACLASS_REGISTRY if name.startswith(PREFIX)]
    for model in models:
        # register_model made an architecture of the same name that leaves the flags as they are;
        # nested values would then be ignored silently.
        ARCH_CONFIG_REGISTRY[model] = _architecture(model, OmegaConf.create())
    for file in sorted(folder.glob("*.yaml")):
        preset = OmegaConf.load(file)
        model = preset.pop("_name", None)
        if model in models:
            register_model_architecture(model, PREFIX + file.stem)(_architecture(model, preset))


def _architecture(model: str, preset: DictConfig) -> Callable[[Any], None]:
    dataclass = MODEL_DATACLASS_REGISTRY[model]

    def configure(args: Any) -> None:
        """Write the preset and, over it, the flags that were given into the parsed flags."""
        if not isinstance(args, argparse.Namespace):
            # fairseq lets its defaults win over an architecture named in a configuration: the
            # result would be another model under this name.
            raise ValueError(
                f"{args._name} is an architecture for --arch; in a configuration write "
                f"_name: {model} and the values of configs/model/"
                f"{args._name.removeprefix(PREFIX)}.yaml"
            )
        values = OmegaConf.merge(preset, _given(args, dataclass))
        for key, value in OmegaConf.to_container(values, resolve=True).items():
            setattr(args, key, _Nested(value) if isinstance(value, dict) else value)
        # From here on, in checkpoints too, it is the plain model with its values written out,
        # so that a checkpoint does not change its meaning with the preset.
        args.arch = model

    return configure


def _given(args: argparse.Namespace, dataclass: type[FairseqDataclass]) -> dict[str, Any]:
    """Return the flags that were given on the command line, nested as in the dataclass."""
    given: dict[str, Any] = {}
    for field in fields(dataclass):
        if isinstance(field.type, type) and issubclass(field.type, FairseqDataclass):
            given[field.name] = {
                inner.name: getattr(args, f"{field.name}_{inner.name}")
                for inner in fields(field.type)
                if hasattr(args, f"{field.name}_{inner.name}")
            }
        elif hasattr(args, field.name):
            given[field.name] = getattr(args, field.name)
    return given


class _Nested(dict):
    """A dict that prints as a value of Hydra's override grammar, which has no quotes on keys.

    fairseq turns parsed flags into overrides `model.encoder=<str(value)>` for Hydra.
    """

    def __str__(self) -> str:
        values = {key: json.dumps(value, ensure_ascii=False) for key, value in self.items()}
        return "{" + ",".join(f"{key}:{value}" for key, value in values.items()) + "}"

    def __reduce__(self) -> tuple[Any, ...]:
        # Old-style optimizers and tasks keep all flags in the checkpoint, which has to load
        # without this class and under torch's weights_only default.
        return OrderedDict, (), None, None, iter(self.items())
