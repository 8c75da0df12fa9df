"""One run from configuration to record: corpus, training, averaging, evaluation, record."""

import errno
import json
import logging
import math
import resource
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from normexp import checkpoints, config, preemption, records, speed
from normexp.atomic import write_json
from normexp.command_line import command_of_this_run
from normexp.corpora import PreparedCorpus, prepare
from normexp.errors import UserError
from normexp.experiment import experiment
from normexp.records import Record
from normexp.run_folder import RunFolder, open_run
from normexp.run_status import recorded
from normexp.superseding import put_record_aside

REPOSITORY = Path(__file__).resolve().parents[1]
FULL_DISK_BYTES = 1_000_000

logger = logging.getLogger(__name__)


def run(cfg: DictConfig) -> Record:
    """Do what a configuration says, from where an earlier attempt stopped, and return the record.

    A run that is complete is not repeated. Raises UserError for what the user can mend; a training
    that diverged is a result and returns a record that says so.
    """
    with _warnings_on_console(), preemption.handled():
        sites = config.validate(cfg)
        return _run_in_folder(cfg, sites)


def _run_in_folder(cfg: DictConfig, sites: dict[str, dict[str, Any]]) -> Record:
    with open_run(cfg) as folder:
        earlier = _complete_record(cfg, folder)
        if earlier is not None:
            return earlier
        plain = config.resolved(cfg)
        # The corpus comes before the log: its progress and its errors belong on the console.
        corpus = prepare(plain["task"]["corpus"], Path(plain["data"]["dir"]), _local(plain))
        if corpus.kind != plain["task"]["kind"]:
            raise UserError(
                f"the corpus {corpus.name} is for {corpus.kind}, the task for "
                f"{plain['task']['kind']}: mend task.corpus or task.kind"
            )
        with _log_to(folder.log):
            return _run(cfg, plain, sites, corpus, folder)


@dataclass(frozen=True)
class Evaluated:
    """What the evaluation of a run found."""

    metrics: dict[str, dict[str, float | str]]
    checkpoint: str
    sees_future_tokens: bool | None  # measured; None for a translation model


def evaluate_run(
    cfg: DictConfig, folder: RunFolder, corpus: PreparedCorpus, fold: bool = False
) -> Evaluated:
    """Evaluate the model of a run folder; metrics per split, and which checkpoint it was.

    fold: merge its norms into linear layers first. Raises UserError where that is impossible.
    """
    from normexp import audit, evaluation

    plain = config.resolved(cfg)
    settings = plain["evaluation"]
    path, chosen = checkpoints.choose(
        folder.checkpoints, settings["checkpoint"], settings["average_last"]
    )
    loaded = evaluation.load_model(path, corpus.data_bin, plain["fairseq"]["common"]["cpu"])
    if fold:
        loaded = evaluation.folded(loaded)
    if corpus.kind == "translation":
        metrics = evaluation.evaluate_translation(loaded, corpus, settings, folder.hypotheses)
        return Evaluated(metrics, chosen, None)
    sees_future = audit.dependence_on_future(loaded, settings["splits"][0]).sees_future
    metrics = evaluation.evaluate_language_model(loaded, corpus, settings, not sees_future)
    return Evaluated(metrics, chosen, sees_future)


def _run(
    cfg: DictConfig,
    plain: dict[str, Any],
    sites: dict[str, dict[str, Any]],
    corpus: PreparedCorpus,
    folder: RunFolder,
) -> Record:
    from normexp.tracking import Tracker

    facts = _facts(cfg, plain, sites, corpus)
    environment = ("hardware", "versions", "code_commit", "code_dirty")
    write_json(folder.path / "environment.json", {name: facts[name] for name in environment})
    _say(f"{facts['task']} · {facts['label']} · seed {facts['seed']} · {plain['run_dir']}")
    _say("  " + ", ".join(f"{site} {norm['name']}" for site, norm in sites.items()))
    tracking = plain["tracking"]
    with Tracker.start(
        tracking["mode"],
        tracking["project"],
        folder.path,
        run_id="-".join([facts["task"], facts["label"], str(facts["seed"]), facts["config_hash"]]),
        name=tracking["name"],
        group=tracking["group"],
        tags=tracking["tags"],
        config=_for_the_dashboard(plain, sites, facts),
    ) as tracker:
        try:
            outcome = _train_and_evaluate(cfg, corpus, folder, tracker)
        except UserError:
            raise
        except Exception as error:
            logger.info("the run failed", exc_info=True)  # the console gets one line, or the error
            if _is_full(folder.path, error):
                raise UserError(
                    f"no space left on the disk of {folder.path}; free some and give the same "
                    "command again, which goes on from the last checkpoint"
                ) from None
            _finish(folder, plain, facts, _failure("failed", f"{type(error).__name__}: {error}"))
            raise
        record = _finish(folder, plain, facts, outcome)
        tracker.summarize(_flat(record))
    return record


def _train_and_evaluate(
    cfg: DictConfig, corpus: PreparedCorpus, folder: RunFolder, tracker: Any
) -> dict[str, Any]:
    """What the record says of the run's course: complete, or diverged with the step."""
    from normexp import training
    from normexp.metrics_file import MetricsFile

    if not folder.finished.is_file():
        languages = (
            (corpus.source_language, corpus.target_language)
            if corpus.kind == "translation"
            else None
        )
        fairseq_cfg = config.fairseq_config(cfg, corpus.data_bin, languages, folder.checkpoints)
        with MetricsFile(folder.metrics) as metrics:
            try:
                settings = speed.settings(config.resolved(cfg))
                result = training.train(fairseq_cfg, metrics, [tracker, _Console()], settings)
            except training.Diverged as diverged:
                return _failure("diverged", diverged.reason) | {
                    "diverged_at_update": diverged.update,
                    "num_updates": diverged.update - 1,
                    "curve": _curve(folder),
                }
        write_json(folder.finished, vars(result))
        preemption.leave_if_asked()
    finished = json.loads(folder.finished.read_text(encoding="utf-8"))
    evaluated = evaluate_run(cfg, folder, corpus)
    logger.info("evaluated: %s", evaluated.checkpoint)
    return finished | {
        "status": "complete",
        "metrics": evaluated.metrics,
        "curve": _curve(folder),
        "sees_future_tokens": evaluated.sees_future_tokens,
        "peak_memory_bytes": _peak_memory(),
    }


def _curve(folder: RunFolder) -> list[tuple[int, float]]:
    """Validation losses as the record has them. fairseq logs bits, and apart from a smoothed loss
    the likelihood."""
    from normexp.metrics_file import MetricsFile

    with MetricsFile(folder.metrics) as metrics:
        bits = metrics.values("valid", "nll_loss") or metrics.values("valid", "loss")
    return [(step, value * math.log(2)) for step, value in bits.items()]


def _is_full(path: Path, error: BaseException | None) -> bool:
    """Whether an error came of a full disk: by its causes, or by the disk as it is now."""
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return True
        error = error.__cause__ or error.__context__
    return shutil.disk_usage(path).free < FULL_DISK_BYTES


def _failure(status: str, reason: str) -> dict[str, Any]:
    from normexp.training import TrainingResult

    unknown = [*(field.name for field in fields(TrainingResult)), "peak_memory_bytes"]
    return dict.fromkeys(unknown) | {"status": status, "reason": reason, "metrics": {}}


def _facts(
    cfg: DictConfig,
    plain: dict[str, Any],
    sites: dict[str, dict[str, Any]],
    corpus: PreparedCorpus,
) -> dict[str, Any]:
    """What the record says of the run before it starts."""
    commit, dirty = records.code_version(REPOSITORY)
    settings = experiment(cfg)
    return {
        "task": plain["task"]["name"],
        "kind": plain["task"]["kind"],
        "norm": plain["norm"]["name"],
        "label": str(plain["label"]),
        "seed": plain["seed"],
        "sites": sites,
        "sees_future_tokens": None,  # measured when the run is evaluated
        "hardware": records.hardware_facts(),
        "versions": records.package_versions(),
        "code_commit": commit,
        "code_dirty": dirty,
        "command": _command(),
        "config": settings,
        "config_hash": records.hash_config(settings, without=["seed"]),
        "corpus": _corpus_facts(corpus),
        "budget": plain["budget"],
    }


def _finish(
    folder: RunFolder, plain: dict[str, Any], facts: dict[str, Any], outcome: dict[str, Any]
) -> Record:
    record = Record(**(facts | outcome), finished_at=records.utc_now())
    _publish(record, Path(plain["results_dir"]))
    records.write_record(folder.record, record)  # last: it is the sign of completion
    return record


def _publish(record: Record, results_dir: Path) -> None:
    path = records.record_path(results_dir, record)
    put_record_aside(path, results_dir, record.task, record.config_hash)
    records.write_record(path, record)


def _complete_record(cfg: DictConfig, folder: RunFolder) -> Record | None:
    """The record of a run that needs nothing more; diverged counts, failed is tried again."""
    if found := recorded(cfg):
        _say(f"complete already: {found[0]}")
        return found[1]
    if not folder.record.is_file():
        return None
    record = records.read_record(folder.record)
    if record.status == "failed":
        return None
    _publish(record, Path(cfg.results_dir))  # somebody removed it from among the results
    _say(f"complete already: {folder.record}")
    return record


def _corpus_facts(corpus: PreparedCorpus) -> dict[str, Any]:
    return {
        "name": corpus.name,
        "hashes": corpus.manifest["files"],
        "counts": corpus.manifest["splits"],
    }


def _command() -> str:
    """The command line without folders, which say nothing to anybody else."""
    given = command_of_this_run()[1:]
    arguments = [argument for argument in given if "/" not in argument and "=~" not in argument]
    return " ".join(["python", "scripts/train.py", *arguments])


def _for_the_dashboard(
    plain: dict[str, Any], sites: dict[str, dict[str, Any]], facts: dict[str, Any]
) -> dict[str, Any]:
    """W&B's config: what one filters and groups by on top, the complete configuration below."""
    handles = ("task", "norm", "label", "seed", "config_hash", "code_commit", "budget")
    return {name: facts[name] for name in handles} | {
        "sites": sites,
        "experiment": {key: value for key, value in plain.items() if key not in ("task", "norm")},
        "task_config": plain["task"],
        "norm_config": plain["norm"],
    }


def _flat(record: Record) -> dict[str, Any]:
    flat = {
        f"{split}/{name}": value
        for split, values in record.metrics.items()
        for name, value in values.items()
    }
    for name in ("status", "num_updates", "num_parameters", "tokens_per_second"):
        flat[name] = getattr(record, name)
    return flat


def _local(plain: dict[str, Any]) -> Path | None:
    return Path(plain["data"]["local"]) if plain["data"]["local"] else None


def _peak_memory() -> int:
    """Bytes: of the GPU's memory allocated to tensors, or of the process on the CPU."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class _Console:
    """One line per validation on standard output."""

    def __call__(self, tag: str, step: int, values: Mapping[str, float]) -> None:
        if tag == "valid":
            _say(
                f"  update {step:>6}  validation loss {values['loss']:.3f} bits, "
                f"perplexity {values.get('ppl', float('nan')):.2f}"
            )


def _say(line: str) -> None:
    print(line, flush=True)


@contextmanager
def _warnings_on_console() -> Iterator[None]:
    """Also keeps fairseq, which finds the root logger taken, from logging to standard output."""
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(logging.WARNING)
    console.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    # Python warnings are torch's and fairseq's talk about each other: for the log.
    console.addFilter(lambda entry: entry.name != "py.warnings")
    logging.captureWarnings(True)
    try:
        with _handler(console):
            yield
    finally:
        logging.captureWarnings(False)


@contextmanager
def _log_to(path: Path) -> Iterator[None]:
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.INFO)
    try:
        with _handler(file):
            yield
    finally:
        root.setLevel(level)
        file.close()


@contextmanager
def _handler(handler: logging.Handler) -> Iterator[None]:
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
