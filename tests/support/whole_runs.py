"""Fixtures of whole runs."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from support.small_runs import SMALL, few_sentences


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the toy corpora are prepared, once for all tests."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def little_text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Corpora with so little text that a run takes a second; the folder they are prepared in."""
    from normexp import pipeline  # here, because torch takes seconds

    folder = tmp_path_factory.mktemp("few_sentences")
    prepare = partial(pipeline.prepare, catalogue=few_sentences(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "prepare", prepare)
        yield folder


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
