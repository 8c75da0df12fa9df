"""Fixtures of whole runs."""

from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import SMALL


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the toy corpora are prepared, once for all tests."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def overrides(tmp_path: Path, data_dir: Path) -> Callable[..., list[str]]:
    """Overrides of a small run: overrides("toy_translation", "norm=power", ...)."""

    def build(task: str, *more: str) -> list[str]:
        return [
            f"task={task}",
            f"data.dir={data_dir}",
            f"results_dir={tmp_path / 'results'}",
            "tracking=disabled",
            "fairseq.optimization.max_epoch=2",
            "fairseq.common.log_interval=1",
            *SMALL[task],
            *more,
        ]

    return build
