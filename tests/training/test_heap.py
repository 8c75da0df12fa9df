"""What a process that trains tells malloc."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc of glibc")

PROGRAM = """
import resource, sys
import torch
from normexp.training import heap

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        blocks = [torch.ones(20 * 2**20, dtype=torch.uint8) for _ in range(3)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = heap.keep_freed()
faults()
print(kept, min(faults() for _ in range(4)))  # the system may reclaim pages meanwhile
"""


def _run(**variables: str) -> tuple[str, int]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    shown = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=True,
        env=environment | variables,
    )
    kept, faults = shown.stdout.split()
    return kept, int(faults)


def test_freed_memory_is_kept() -> None:
    """60 MiB are 15,360 pages; without being told, malloc gives them back each time."""
    kept, faults = _run()
    assert kept == "True" and faults < 1000


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_a_users_own_settings_stay(name: str) -> None:
    value = "glibc.malloc.trim_threshold=131072" if name == "GLIBC_TUNABLES" else "131072"
    kept, faults = _run(**{name: value})
    assert kept == "False" and faults > 10_000
