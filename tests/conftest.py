"""Fixtures shared by all tests."""

import os
from pathlib import Path

import hypothesis
import pytest
from support.made_up_records import make_record  # noqa: F401 (a fixture)
from support.whole_runs import (  # noqa: F401 (fixtures)
    data_dir,
    few_sentences_dir,
    little_text,
    overrides,
)

REPOSITORY = Path(__file__).resolve().parents[1]

# Results must not depend on how many cores the machine happens to have.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("no_deadline", deadline=None)
hypothesis.settings.load_profile("no_deadline")


# Files of few long tests. They begin first, or one process would be left alone with one of them.
LONG = ("test_survival", "test_distributed", "test_evaluation", "test_triton", "test_interruptions")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first; `make test` gives whole files to its processes in this order.

    Tests get the markers of the programs that they need, by their fixtures.
    """
    for item in items:
        for program in {"slurm", "browser"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(program)
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture
def local_data() -> Path:
    """Folder with the real PTB and Multi30k files, or a visible skip where there is none."""
    folder = Path(os.environ.get("NORMEXP_LOCAL_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no local corpora: {folder} is absent (set NORMEXP_LOCAL_DATA)")
    return folder
