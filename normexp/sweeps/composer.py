"""Compose the runs of a sweep; runs that choose the same groups share most of it."""

import copy
import functools
from collections.abc import Sequence
from contextlib import suppress

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from normexp.config.departures import config_loader
from normexp.config.settings import without_hydra


class SweepComposer:
    """Composes runs as Hydra does; what it has composed does not follow changes of the files.

    Attributes:
        parser: Of overrides.
    """

    def __init__(self) -> None:
        self._loader = config_loader()
        self.parser = OverridesParser.create(config_loader=self._loader)
        self._shared = functools.cache(self._without_hydra)

    def composed(self, overrides: Sequence[str]) -> DictConfig:
        """Return a configuration with Hydra's own part. Raises HydraException."""
        return self._loader.load_configuration("train", list(overrides), run_mode=RunMode.RUN)

    def run(self, overrides: Sequence[str]) -> tuple[DictConfig, dict[str, str | None]]:
        """Return the configuration of a run without Hydra's own part, and its choices of groups.

        Raises HydraException.
        """
        parsed = self.parser.parse_overrides(list(overrides))
        # Hydra sets single values last, in the whole that the choices of groups make.
        values = [one for one in parsed if self._sets_a_value(one)]
        others = tuple(one.input_line for one in parsed if one not in values)
        # With another search path there may be groups that are not known here.
        if not any(one.startswith("hydra.searchpath") for one in others):
            shared, choices = self._shared(others)
            cfg = copy.deepcopy(shared)
            # Of an error Hydra says more than one of these functions.
            with suppress(HydraException, OmegaConfBaseException):
                ConfigLoaderImpl._apply_overrides_to_config(values, cfg)
                return cfg, choices
        return self._without_hydra(overrides)

    def _without_hydra(self, overrides: Sequence[str]) -> tuple[DictConfig, dict[str, str | None]]:
        cfg = self.composed(overrides)
        own = without_hydra(cfg)
        OmegaConf.set_struct(own, True)  # as Hydra's: unknown keys are errors
        return own, dict(cfg.hydra.runtime.choices)

    def _sets_a_value(self, override: Override) -> bool:
        if override.is_hydra_override():
            return False
        is_group = self._loader.repository.group_exists(override.key_or_group)
        return not is_group or isinstance(override.value(), dict)
