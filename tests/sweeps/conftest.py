"""A SLURM cluster for the tests of this folder."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import cluster


@pytest.fixture
def slurm() -> Iterator[cluster.Cluster]:
    """A cluster of its own, stopped again whatever happens."""
    if reason := cluster.why_not():
        pytest.skip(reason)
    # not below tmp_path: the name of a socket is limited in length, and munged wants folders that
    # others may enter
    with tempfile.TemporaryDirectory(prefix="slurm", ignore_cleanup_errors=True) as folder:
        running = cluster.Cluster(Path(folder))
        try:
            running.start()
            yield running
        finally:
            running.stop()
