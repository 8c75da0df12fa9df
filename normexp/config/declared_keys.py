"""The keys that fairseq's own dataclasses declare, whether configs/ names them or not."""

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf

from normexp.config.fairseq_keys import registries


def declared_keys(config: DictConfig) -> Iterator[str]:
    """Yield every key that `fairseq` may have with its chosen model, task, criterion and so on.

    config: a composed configuration. Keys are complete, such as "fairseq.optimization.lr".
    """
    logging.disable(logging.INFO)  # fairseq's, of what it could have and does not need
    chosen = registries()
    from fairseq.dataclass.configs import FairseqConfig  # here, because it takes seconds

    logging.disable(logging.NOTSET)
    for group, declared in get_type_hints(FairseqConfig).items():
        if group in chosen:
            declared = chosen[group].get(OmegaConf.select(config, f"fairseq.{group}._name"))
        yield from _keys(declared, f"fairseq.{group}")


def _keys(declared: Any, prefix: str) -> Iterator[str]:
    if not (isinstance(declared, type) and dataclasses.is_dataclass(declared)):
        return
    types = get_type_hints(declared)
    for field in dataclasses.fields(declared):
        if field.name != "_name":
            yield f"{prefix}.{field.name}"
            yield from _keys(types[field.name], f"{prefix}.{field.name}")
