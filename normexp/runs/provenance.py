"""The origin of a result: machine, package versions, code version, command line, time."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def command_of_this_run() -> list[str]:
    """Return script and arguments; for a run of a sweep, the arguments of this run alone."""
    from hydra.core.hydra_config import HydraConfig  # here, because reports run without it
    from hydra.types import RunMode

    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        return ["scripts/train.py", *HydraConfig.get().overrides.task]
    return sys.argv


def hardware_facts() -> dict[str, Any]:
    """Return processor, usable cores, memory (bytes) and GPUs of this machine, not its name."""
    import torch  # here, because reports read records without it

    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text("utf-8"), re.MULTILINE)
        processor = model.group(1).strip() if model else processor
    usable = getattr(os, "sched_getaffinity", None)
    return {
        "system": platform.system(),
        "processor": processor,
        "num_cores": len(usable(0)) if usable else os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
    }


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that can change a number."""
    versions = {"python": platform.python_version()}
    for package in (
        "torch",
        "fairseq-fixed",
        "hydra-core",
        "numpy",
        "sacrebleu",
        "sacremoses",
        "subword-nmt",
        "wandb",
    ):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def code_version(repository: Path) -> tuple[str, bool | None]:
    """Return the commit and whether files differ from it; ("unknown", None) without git.

    `results/` does not count: there each run leaves its record.
    """
    git = ["git", "-C", str(repository)]
    try:
        root, commit = _lines([*git, "rev-parse", "--show-toplevel", "HEAD"])
        changes = _lines([*git, "status", "--porcelain", "--", ".", ":(exclude)results"])
    except (OSError, subprocess.CalledProcessError):
        return "unknown", None
    if Path(root).resolve() != repository.resolve():  # a copy inside somebody else's repository
        return "unknown", None
    return commit, bool(changes)


def utc_now() -> str:
    """Return the current time as records store it: ISO 8601, UTC, in seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _lines(command: list[str]) -> list[str]:
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    return [line for line in shown.stdout.split("\n") if line]
