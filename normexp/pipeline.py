"""One run from configuration to record: corpus, training, averaging, evaluation, record."""

import errno
import json
import logging
import math
import os
import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from normexp.checkpoints import store
from normexp.config import validation
from normexp.config.identity import experiment
from normexp.corpora import PreparedCorpus, prepare
from normexp.errors import UserError
from normexp.files import write_json
from normexp.paths import REPOSITORY
from normexp.runs import advice, records
from normexp.runs.archive import put_record_aside
from normexp.runs.command_line import command_of_this_run
from normexp.runs.folder import RunFolder, open_run
from normexp.runs.records import Record
from normexp.sweeps.run_status import recorded
from normexp.training import preemption, process_group, speed
from normexp.training.process_group import Ranks

logger = logging.getLogger(__name__)


def run(cfg: DictConfig) -> Record | None:
    """Do what a configuration says, from where an earlier attempt stopped, and return the record.

    A run that is complete is not repeated. Raises UserError for what the user can mend; a training
    that diverged is a result and returns a record that says so. Where torchrun or srun started
    several processes, rank 0 does all this; the others train along, and return None.
    """
    with (
        preemption.handled(),
        process_group.together() as ranks,
        _warnings_on_console(ranks.is_main),
    ):
        if not ranks.is_main:
            _train_along(cfg, ranks)
            return None
        sites = validation.validate(cfg)
        ranks.refuse_other_number(process_group.settings(validation.resolved(cfg))["ranks"])
        try:
            record = _run_in_folder(cfg, sites, ranks)
        except OSError as error:
            told = advice.about_files(error, Path(validation.resolved(cfg)["run_dir"]))
            if told is None:
                raise
            raise UserError(told) from None
        ranks.succeeded = record.status == "complete"
        return record


def _train_along(cfg: DictConfig, ranks: Ranks) -> None:
    from normexp.training import loop

    told = ranks.told("training")
    languages = told["languages"] and tuple(told["languages"])
    paths = Path(told["data_bin"]), Path(told["checkpoints"])
    fairseq_cfg = validation.fairseq_config(cfg, paths[0], languages, paths[1])
    with suppress(loop.Diverged):  # on all ranks: rank 0 records it
        loop.train(fairseq_cfg, None, [], speed.settings(validation.resolved(cfg)), ranks)


def _run_in_folder(cfg: DictConfig, sites: dict[str, dict[str, Any]], ranks: Ranks) -> Record:
    plain = validation.resolved(cfg)
    if found := recorded(cfg):
        _say(f"complete already: {found[0]}")
        return found[1]
    with open_run(cfg) as folder:
        earlier = _complete_record(folder, Path(plain["results_dir"]))
        if earlier is not None:
            return earlier
        _check_records_writable(Path(plain["results_dir"]) / "records" / plain["task"]["name"])
        # The corpus comes before the log: its progress and its errors belong on the console.
        corpus = prepare(plain["task"]["corpus"], Path(plain["data"]["dir"]), _local(plain))
        if corpus.kind != plain["task"]["kind"]:
            raise UserError(
                f"the corpus {corpus.name} is for {corpus.kind}, the task for "
                f"{plain['task']['kind']}: mend task.corpus or task.kind"
            )
        with _log_to(folder.log):
            return _run(cfg, plain, sites, corpus, folder, ranks)


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
    from normexp.evaluation import causality, scores

    plain = validation.resolved(cfg)
    settings = plain["evaluation"]
    path, chosen = store.choose(
        folder.checkpoints,
        settings["checkpoint"],
        settings["average_last"],
        plain["fairseq"]["checkpoint"].get("save_interval", 1),
    )
    loaded = scores.load_model(path, corpus.data_bin, plain["fairseq"]["common"]["cpu"])
    if fold:
        loaded = scores.folded(loaded)
    if corpus.kind == "translation":
        metrics = scores.evaluate_translation(loaded, corpus, settings, folder.hypotheses)
        return Evaluated(metrics, chosen, None)
    sees_future = causality.future_sensitivity(loaded, settings["splits"][0]).sees_future
    metrics = scores.evaluate_language_model(loaded, corpus, settings, not sees_future)
    return Evaluated(metrics, chosen, sees_future)


def _run(
    cfg: DictConfig,
    plain: dict[str, Any],
    sites: dict[str, dict[str, Any]],
    corpus: PreparedCorpus,
    folder: RunFolder,
    ranks: Ranks,
) -> Record:
    from normexp.tracking.tracker import Tracker

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

        def rank_failed(reason: str) -> None:
            _finish(folder, plain, facts, _failure("failed", reason))
            tracker.finish(failed=True)

        ranks.on_failure = rank_failed
        try:
            outcome = _train_and_evaluate(cfg, corpus, folder, tracker, ranks)
        except UserError:
            raise
        except Exception as error:
            logger.info("the run failed", exc_info=True)  # the console gets one line, or the error
            if ranks.lost_another(error):
                raise UserError(
                    "another rank of this training was killed; the same command goes on from the "
                    "last checkpoint"
                ) from None
            if told := advice.about_files(error, folder.path):
                raise UserError(told) from None
            told = advice.about_memory(error, plain, folder.finished.is_file())
            reason = told or f"{type(error).__name__}: {error}"
            _finish(folder, plain, facts, _failure("failed", reason))
            if told:
                raise UserError(told) from None
            raise
        record = _finish(folder, plain, facts, outcome)
        tracker.summarize(_flat(record))
    return record


def _train_and_evaluate(
    cfg: DictConfig, corpus: PreparedCorpus, folder: RunFolder, tracker: Any, ranks: Ranks
) -> dict[str, Any]:
    """What the record says of the run's course: complete, or diverged with the step."""
    from normexp.runs.metrics_file import MetricsFile
    from normexp.training import loop

    finished = _finished_training(folder)
    if finished is None:
        languages = (
            (corpus.source_language, corpus.target_language)
            if corpus.kind == "translation"
            else None
        )
        fairseq_cfg = validation.fairseq_config(cfg, corpus.data_bin, languages, folder.checkpoints)
        told = {"data_bin": str(corpus.data_bin.absolute()), "languages": languages}
        ranks.tell("training", told | {"checkpoints": str(folder.checkpoints)})
        with MetricsFile(folder.metrics) as metrics:
            try:
                settings = speed.settings(validation.resolved(cfg))
                sinks = [tracker, _Console()]
                result = loop.train(fairseq_cfg, metrics, sinks, settings, ranks)
            except loop.Diverged as diverged:
                return _failure("diverged", diverged.reason) | {
                    "diverged_at_update": diverged.update,
                    "diverged_site": diverged.site,
                    "num_updates": diverged.update - 1,
                    "curve": _curve(folder),
                }
        finished = vars(result)
        write_json(folder.finished, finished)
        preemption.leave_if_asked()
    try:
        evaluated = evaluate_run(cfg, folder, corpus)
    except store.Lost as lost:
        folder.finished.unlink()  # first: a kill must not leave it with too few checkpoints
        source = store.go_back_before(folder.checkpoints, lost)
        if ranks.size > 1:  # the others have trained to the end and left
            raise UserError(f"{lost}; the same command makes it again from {source}") from None
        logger.warning("%s; going on from %s to make it again", lost, source)
        return _train_and_evaluate(cfg, corpus, folder, tracker, ranks)
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
    from normexp.runs.metrics_file import MetricsFile

    with MetricsFile(folder.metrics) as metrics:
        bits = metrics.values("valid", "nll_loss") or metrics.values("valid", "loss")
    return [(step, value * math.log(2)) for step, value in bits.items()]


def _finished_training(folder: RunFolder) -> dict[str, Any] | None:
    """What training left when it had ended; None where it has not, as far as can be read."""
    from normexp.training.loop import TrainingResult

    try:
        return vars(TrainingResult(**json.loads(folder.finished.read_text(encoding="utf-8"))))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        # A training that has ended finds its last checkpoint and ends at once.
        logger.warning("%s cannot be read (%s); looking at the training", folder.finished, error)
        return None


def _failure(status: str, reason: str) -> dict[str, Any]:
    from normexp.training.loop import TrainingResult

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
    parallel = process_group.settings(plain)
    return {
        "task": plain["task"]["name"],
        "kind": plain["task"]["kind"],
        "norm": plain["norm"]["name"],
        "label": str(plain["label"]),
        "seed": plain["seed"],
        "sites": sites,
        "sees_future_tokens": None,  # measured when the run is evaluated
        "ranks": parallel["ranks"],
        "statistics": parallel["statistics"] if parallel["ranks"] > 1 else None,
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


def _complete_record(folder: RunFolder, results_dir: Path) -> Record | None:
    """The record of a run that needs nothing more; diverged counts, failed is tried again."""
    if not folder.record.is_file():
        return None
    try:
        record = records.read_record(folder.record)
    except UserError as error:
        logger.warning("%s; the run is evaluated again", error)
        return None
    if record.status == "failed":
        return None
    _publish(record, results_dir)  # somebody removed it from among the results
    _say(f"complete already: {folder.record}")
    return record


def _check_records_writable(folder: Path) -> None:
    """Before any work, because records may lie on another disk than the run. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS), str(folder))


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
    handles = ("task", "kind", "norm", "label", "seed", "config_hash", "budget", "corpus")
    circumstances = ("code_commit", "code_dirty", "command", "hardware", "versions")
    return {name: facts[name] for name in (*handles, *circumstances)} | {
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
    course = ("status", "reason", "diverged_at_update", "num_updates", "num_epochs")
    cost = ("num_parameters", "tokens_per_second", "peak_memory_bytes", "wall_time_seconds")
    return flat | {name: getattr(record, name) for name in (*course, *cost)}


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
def _warnings_on_console(wanted: bool) -> Iterator[None]:
    """Also keeps fairseq, which finds the root logger taken, from logging to standard output."""
    console = logging.StreamHandler(sys.stderr) if wanted else logging.NullHandler()
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
    file.handleError = lambda record: None  # a full disk costs lines, not a traceback for each
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
