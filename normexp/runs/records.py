"""The record of a run: everything a reader needs to trust one number or to make it again.

A record is one JSON file, `records/<task>/<label>-seed<k>.json`, written once when a run ends,
however it ends. Tables are made from records and from nothing else.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, StringConstraints, TypeAdapter, ValidationError

from normexp.config.identity import config_hash, hash_config
from normexp.config.settings import ExperimentSettings, validated
from normexp.errors import UserError, invalid_fields
from normexp.files import Unreadable, read_json, whole_file
from normexp.paths import home_folder
from normexp.runs.metric_values import value_of

SCHEMA_VERSION = 1

Metrics = dict[str, float | str | None]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The part of a record that is known before the run starts: settings, corpus, machine, code.

    Attributes:
        task: Name of the task's configuration, such as "iwslt14".
        norm: Name of the normalization, as in `available_norms()`.
        label: Name of the row in the tables; runs that differ only in their seed share it.
        sites: For each of the seven sites its norm's name and options.
        ranks: How many processes trained together, each with a batch of its own in an update.
        statistics: Whether the norms took statistics over the tokens of all ranks, unless `sites`
            says otherwise, or each rank kept its own ("local"), averaged wherever they were
            validated and saved. None with one rank.
        config: `ExperimentSettings.experiment()`: all settings that decide the result.
        config_hash: `config.identity.config_hash`; runs of one hash are averaged over their seeds.
        corpus: Name, SHA-256 of each file and counts.
        budget: None in the setting of the paper, otherwise how this run falls short of it.
        departures: What the command changed in the configuration of its task, norm and experiment,
            such as "fairseq.optimization.lr=[0.01] instead of [0.003]".
    """

    task: str
    kind: Literal["translation", "language_model"]
    norm: str
    label: str
    seed: int
    sites: dict[str, dict[str, Any]]
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
    departures: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The part of a record that is known when the run has ended: status, metrics, cost.

    Attributes:
        status: "complete", "diverged" (see `diverged_at_update`) or "failed"; the last two have a
            `reason`.
        diverged_site: Site and layer ("encoder_ffn/0") at which running statistics, or what was to
            be averaged into them, were first not finite in the failed update
            (`training.divergence.StatisticsWatch` explains what that says of the cause). None
            without divergence, without such norms, and where all of it was finite.
        metrics: By split ("valid", "test", a further test set), then by name. A name says which
            convention it follows.
        curve: (update, validation loss per token in nats) at every validation while training.
        sees_future_tokens: Whether a language model's output depends on the tokens it predicts;
            None for translation.
        num_epochs: Epochs begun.
        tokens_per_second: Real target tokens of all ranks, over all updates.
        peak_memory_bytes: Of this run, training and evaluation: the GPU's memory allocated to
            tensors, or the process's on the CPU; None where the system cannot tell it from that
            of earlier runs in the process.
        peak_memory_of: "process" in older records, which may hold an earlier run's peak.
        kernels: How many layers with running statistics were trained by "native" (compiled),
            "triton" or "plain" kernels; None where the run ended before, or is older than they are.
        notes: What a reader of the result has to know, in sentences: a warm-up that outlasted it.
    """

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
    peak_memory_of: Literal["run", "process"] = "process"
    wall_time_seconds: float | None
    kernels: dict[str, int] | None = None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def without_result(cls, status: str, reason: str, **known: Any) -> "Outcome":
        """Return the outcome of a run that failed or diverged; fields not in `known` are None."""
        unknown = dict.fromkeys(
            one.name for one in fields(cls) if one.default is one.default_factory is MISSING
        )
        return cls(**{**unknown, "metrics": {}, "status": status, "reason": reason, **known})


@dataclass(frozen=True, kw_only=True)
class Record(Asked, Outcome):
    """One run: what was asked and what came out, as one flat JSON object.

    A value that could not be determined, or is not a finite number, is None.

    Attributes:
        finished_at: ISO 8601, UTC, as `provenance.utc_now()` gives it.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False
    )

    schema_version: Literal[1] = SCHEMA_VERSION
    finished_at: Annotated[
        str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(Z|\+00:00)$")
    ]

    @classmethod
    def of(cls, asked: Asked, outcome: Outcome, finished_at: str) -> "Record":
        """Join the two parts into a record."""
        return cls(**vars(asked), **vars(outcome), finished_at=finished_at)


_RECORD = TypeAdapter(Record)


def record_path(results_dir: Path, record: Record) -> Path:
    """Return the path of a record: label "PN-released" with seed 3: `PN-released-seed3.json`."""
    return path_of_run(results_dir, record.task, record.label, record.seed)


def path_of_run(results_dir: Path, task: str, label: str, seed: int) -> Path:
    """Return the path of a run's record, whether it exists or not."""
    return results_dir / "records" / task / f"{label}-seed{seed}.json"


def write_record(path: Path, record: Record) -> None:
    """Write atomically: whoever reads `path` finds the old record or the new one, never a part.

    Numbers that are not finite become null, and the working folder and the home folder are
    replaced by "." and "~" wherever they occur (an error message quotes paths). Raises ValueError
    naming the field if the record does not have the types it declares.
    """
    content = _content(record)
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(text + "\n")


def check(record: Record) -> None:
    """Raise ValueError naming the field if `write_record` would not write this record."""
    _content(record)


def describe(record: Record) -> str:
    """Return one line with the status and the main test metrics."""
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
    test = record.metrics.get("test") or next(iter(record.metrics.values()))
    values = {name: value_of(test, key) for key, name in shown.items() if key in test}
    numbers = [f"{name} {_rounded(value)}" for name, value in values.items()]
    return head + ", ".join(numbers) + f" ({record.num_updates} updates)"


def _rounded(value: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:.2f}" if value < 1e9 else f"{value:.3g}"


def read_record(path: Path) -> Record:
    """Read a record. Raises UserError naming the file and its first invalid fields.

    A record written under the earlier rule of hashing, by which nothing was left out, gets the
    `config_hash` of today's rule: it is of the same run.
    """
    try:
        content = read_json(path, finite=True)
    except Unreadable as error:
        raise UserError(f"{error}; restore it or run again") from None
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path}: record schema {version} is unknown; this version reads {SCHEMA_VERSION}"
        )
    try:
        record = _RECORD.validate_json(json.dumps(content))
    except ValidationError as error:
        raise UserError(f"{path}: {invalid_fields(error)}") from None
    if record.config_hash != hash_config(record.config, without=["seed"]):
        return record
    try:
        settings = validated(ExperimentSettings, record.config)
    except UserError:  # settings that this version does not know: nothing of today is equal to them
        return record
    return replace(record, config_hash=config_hash(settings))


def load_records(results_dir: Path) -> dict[Path, Record]:
    """Read all records below `results_dir`; returns them by path, in the order of their paths.

    Raises UserError for the first that cannot be read, or that lies elsewhere than `record_path`
    says: a copied file would count twice.
    """
    records = {}
    for path in sorted((results_dir / "records").rglob("*.json")):
        record = records[path] = read_record(path)
        if path != (proper := record_path(results_dir, record)):
            raise UserError(f"{path}: this record belongs at {proper}; move or delete it")
    return records


def _content(record: Record) -> dict[str, Any]:
    """Return what `write_record` writes; raises ValueError as it does."""
    folders = {str(Path.cwd()): "."} | ({str(home): "~"} if (home := home_folder()) else {})
    content = _storable(asdict(record), folders)
    try:
        _RECORD.validate_json(json.dumps(content, allow_nan=False))
    except ValidationError as error:
        raise ValueError(f"not a valid record: {invalid_fields(error)}") from error
    return content


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
