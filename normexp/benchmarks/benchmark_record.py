"""The record of a benchmark: its measurements, and the conditions under which they were made."""

import os
from pathlib import Path
from typing import Any

import torch

from normexp.files import write_json
from normexp.paths import REPOSITORY
from normexp.runs.provenance import code_version, hardware_facts, package_versions, utc_now

# On a CPU page faults of fresh memory cost more than many layers; these decide their number.
_MALLOC = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "LD_PRELOAD")


def write_record(
    record: Path, benchmark: str, options: dict[str, Any], measured: dict[str, Any]
) -> dict[str, Any]:
    """Write `measured` with the conditions of the measurement to `record`, and return both.

    The conditions are the command (made of `options`, those of scripts/benchmark.py without
    dashes, and torch's number of threads), hardware, malloc settings, versions, commit and time.
    """
    commit, dirty = code_version(REPOSITORY)
    given = " ".join(f"--{name} {value}" for name, value in options.items())
    result = measured | {
        "malloc": {name: os.environ[name] for name in _MALLOC if name in os.environ} or "default",
        "hardware": hardware_facts(),
        "versions": package_versions(),
        "code_commit": commit,
        "code_dirty": dirty,
        "command": f"python scripts/benchmark.py {benchmark} {given} "
        f"--threads {torch.get_num_threads()}",
        "measured_at": utc_now(),
    }
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, result)
    return result
