"""The record of a run: everything a reader needs to trust one number or to make it again.

A record is one JSON file, `records/<task>/<label>-seed<k>.json`, written once when a run ends,
however it ends. Tables are made from records and from nothing else.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, StringConstraints, TypeAdapter, ValidationError

from normexp.errors import UserError, invalid_fields
from normexp.files import whole_file

SCHEMA_VERSION = 1

Metrics = dict[str, float | str | None]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run. A value that could not be determined, or is not a finite number, is None.

    Attributes:
        task: Name of the task's configuration, such as "iwslt14".
        norm: Name of the normalization, as in `available_norms()`.
        label: Name of the row in the tables; runs that differ only in their seed share it.
        sites: For each of the seven sites its norm's name and options.
        status: "complete", "diverged" (see `diverged_at_update`) or "failed"; the last two have a
            `reason`.
        diverged_site: Site and layer ("encoder_ffn/0") at which running statistics, or what was to
            be averaged into them, were first not finite in the failed update
            (`StatisticsWatch` tells what that says of the cause). None without
            divergence, without such norms, and where all of it was finite.
        metrics: By split ("valid", "test"), then by name. A name says which convention it follows.
        curve: (update, validation loss per token in nats) at every validation while training.
        sees_future_tokens: Whether a language model's output depends on the tokens it predicts;
            None for translation.
        ranks: How many processes trained together, each with a batch of its own in an update.
        statistics: Whether the norms took statistics over the tokens of all ranks, unless `sites`
            says otherwise, or each rank kept its own ("local"), averaged wherever they were
            validated and saved. None with one rank.
        kernels: How many layers with running statistics were trained by "native" (compiled),
            "triton" or "plain" kernels; None where the run ended before, or is older than they are.
        config: The resolved configuration without machine-dependent paths.
        config_hash: `hash_config` of what must be equal for two runs to be averaged.
        corpus: Name, SHA-256 of each file and counts.
        budget: None in the setting of the paper, otherwise how this run falls short of it.
        finished_at: ISO 8601, UTC, as `utc_now()` gives it.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False
    )

    schema_version: Literal[1] = SCHEMA_VERSION
    task: str
    kind: Literal["translation", "language_model"]
    norm: str
    label: str
    seed: int
    sites: dict[str, dict[str, Any]]
    status: Literal["complete", "diverged", "failed"]
    reason: str | None = None
    diverged_at_update: int | None = None
    diverged_site: str | None = None
    metrics: dict[str, Metrics]
    curve: list[tuple[int, float]] = field(default_factory=list)
    sees_future_tokens: bool | None
    num_parameters: int | None
    num_updates: int | None
    num_epochs: float | None
    tokens_per_second: float | None
    peak_memory_bytes: int | None
    wall_time_seconds: float | None
    kernels: dict[str, int] | None = None
    ranks: int = 1
    statistics: Literal["synchronized", "local"] | None = None
    hardware: dict[str, Any]
    versions: dict[str, str]
    code_commit: str
    code_dirty: bool | None
    command: str
    config: dict[str, Any]
    config_hash: str
    corpus: dict[str, Any]
    budget: str | None
    finished_at: Annotated[
        str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(Z|\+00:00)$")
    ]


_RECORD = TypeAdapter(Record)


def record_path(results_dir: Path, record: Record) -> Path:
    """Where a record belongs: "PN (released)" with seed 3 gives `PN-released-seed3.json`."""
    return path_of_run(results_dir, record.task, record.label, record.seed)


def path_of_run(results_dir: Path, task: str, label: str, seed: int) -> Path:
    """Where the record of a run belongs, whether it exists or not."""
    name = re.sub(r"[^A-Za-z0-9.+_=]+", "-", label).strip("-")
    return results_dir / "records" / task / f"{name}-seed{seed}.json"


def write_record(path: Path, record: Record) -> None:
    """Write atomically: whoever reads `path` finds the old record or the new one, never a part.

    Numbers that are not finite become null, and the working folder and the home folder are
    replaced by "." and "~" wherever they occur (an error message quotes paths). Raises ValueError
    naming the field if the record does not have the types it declares.
    """
    folders = {str(Path.cwd()): ".", str(Path.home()): "~"}
    content = _storable(asdict(record), folders)
    try:
        _RECORD.validate_json(json.dumps(content, allow_nan=False))
    except ValidationError as error:
        raise ValueError(f"not a valid record: {invalid_fields(error)}") from error
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(text + "\n")


def describe(record: Record) -> str:
    """One line with what a reader wants to know first."""
    head = f"{record.task} {record.label} seed {record.seed}: "
    if record.status != "complete":
        return head + f"{record.status}, {record.reason}"
    shown = {
        "bleu_tokenised": "tokenised BLEU",
        "sacrebleu": "sacreBLEU",
        "perplexity_per_word": "perplexity per word",
        "perplexity_per_token": "per token",
    }
    if record.kind == "translation":
        del shown["perplexity_per_word"], shown["perplexity_per_token"]
    test = record.metrics.get("test") or record.metrics["valid"]
    numbers = [f"{name} {test[key]:.2f}" for key, name in shown.items() if key in test]
    return head + ", ".join(numbers) + f" ({record.num_updates} updates)"


def read_record(path: Path) -> Record:
    """Read a record; UserError names the file and what is wrong with it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); restore it or run again") from None
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path}: record schema {version} is unknown; this version reads {SCHEMA_VERSION}"
        )
    try:
        return _RECORD.validate_json(json.dumps(content))
    except ValidationError as error:
        raise UserError(f"{path}: {invalid_fields(error)}") from None


def load_records(results_dir: Path) -> dict[Path, Record]:
    """All records below `results_dir`, by path and in the order of their paths.

    Raises UserError for the first that cannot be read, or that lies elsewhere than `record_path`
    says: a copied file would count twice.
    """
    records = {}
    for path in sorted((results_dir / "records").rglob("*.json")):
        record = records[path] = read_record(path)
        if path != (proper := record_path(results_dir, record)):
            raise UserError(f"{path}: this record belongs at {proper}; move or delete it")
    return records


def hash_config(config: Mapping[str, Any], without: Iterable[str] = ()) -> str:
    """First 12 hex digits of the SHA-256 of a configuration; its order does not matter.

    `without` names dotted keys that may differ between runs that are averaged, such as "seed".
    """
    kept = json.loads(json.dumps(config))
    for key in without:
        *parents, last = key.split(".")
        node = kept
        for parent in parents:
            node = node.get(parent, {})
        node.pop(last, None)
    canonical = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def hardware_facts() -> dict[str, Any]:
    """Processor, usable cores, memory and GPUs of this machine, without any name of it."""
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
    """Versions of Python and of the packages that can change a number."""
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
    """Commit of the repository and whether its files differ from it; ("unknown", None) without git.

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
    """The time as records store it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _lines(command: list[str]) -> list[str]:
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    return [line for line in shown.stdout.split("\n") if line]


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


def _storable(value: Any, folders: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _storable(item, folders) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_storable(item, folders) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        for folder, name in folders.items():
            if folder != "/":
                value = re.sub(rf"(?<![\w/.~-]){re.escape(folder)}(?![\w-]|\.\w)", name, value)
    return value
