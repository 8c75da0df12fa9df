"""Fixtures of whole runs."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from normexp.corpora import prepare
from support.small_runs import SMALL, few_sentences


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the toy corpora are prepared, once for all tests."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def few_sentences_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the corpora of `little_text` are prepared, once for all tests."""
    folder = tmp_path_factory.mktemp("few_sentences")
    few_sentences(folder)
    return folder


@pytest.fixture(scope="module")
def little_text(few_sentences_dir: Path) -> Iterator[Path]:
    """Corpora with so little text that a run takes a second; the folder they are prepared in.

    Also in scripts that forked_scripts.py runs. Not in processes that begin anew: these need the
    file catalogue.yaml of the folder.
    """
    *others, _ = prepare.__defaults__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "__defaults__", (*others, few_sentences_dir / "catalogue.yaml"))
        yield few_sentences_dir


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
