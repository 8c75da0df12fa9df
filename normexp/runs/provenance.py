"""The origin of a result: machine, package versions, code version, command line, time."""

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from normexp.config.settings import RunSettings

_OF_THE_MACHINE = re.compile(r"[+~]*(data\.|results_dir=|run_dir=|tracking[.=]|hydra[./])")
"""Overrides that decide where a run lies and not what it computes."""


def command_of_this_run() -> list[str]:
    """Return script and arguments; for a run of a sweep, the arguments of this run alone."""
    from hydra.core.hydra_config import HydraConfig  # here, because reports run without it
    from omegaconf import OmegaConf

    if HydraConfig.initialized():
        # As they were typed: read one by one, their references would be resolved.
        given = HydraConfig.get().overrides.task
        return ["scripts/train.py", *OmegaConf.to_container(given, resolve=False)]
    return sys.argv


def command_for_a_shell(settings: RunSettings) -> str:
    """Return the command that makes this run again on any machine, quoted for a shell.

    Folders and tracking are left out; what the environment decided is added. A checkpoint that the
    run begins with is named by its content, for which its place has to be put in.
    """
    donor = rf"\1sha256:{settings.finetuned_from}"
    overrides = [
        re.sub(r"^(\+*fairseq\.checkpoint\.finetune_from_model=).+", donor, each)
        for each in command_of_this_run()[1:]
        if not _OF_THE_MACHINE.match(each)
    ]
    kernels = settings.speed.kernels
    if kernels != "auto" and not any("speed.kernels=" in each for each in overrides):
        overrides.append(f"speed.kernels={kernels}")
    ranks = settings.distributed.ranks
    start = ["torchrun", f"--nproc-per-node={ranks}"] if ranks > 1 else ["python"]
    return shlex.join([*start, "scripts/train.py", *overrides])


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
