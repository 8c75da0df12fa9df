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
    result = measured | conditions(benchmark, options)
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, result)
    return result


def conditions(benchmark: str, options: dict[str, Any]) -> dict[str, Any]:
    """The conditions of a measurement that is made now; see `write_record`."""
    commit, dirty = code_version(REPOSITORY)
    given = [
        f"--{name}" if value is True else f"--{name} {value}"
        for name, value in options.items()
        if value is not False and value is not None
    ]
    given.append(f"--threads {torch.get_num_threads()}")
    return {
        "malloc": {name: os.environ[name] for name in _MALLOC if name in os.environ} or "default",
        "hardware": hardware_facts(),
        "versions": package_versions(),
        "code_commit": commit,
        "code_dirty": dirty,
        "command": " ".join(["python scripts/benchmark.py", benchmark, *given]),
        "measured_at": utc_now(),
    }
