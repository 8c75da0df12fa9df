"""One run from its settings to its record: corpus, training, averaging, evaluation, record."""

import json
import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from normexp.checkpoints import recovery, store
from normexp.config.departures import marked_budget
from normexp.config.fairseq_config import trainer_config
from normexp.config.identity import config_hash
from normexp.config.settings import RunSettings
from normexp.config.terminal import say
from normexp.config.validation import Sites, ValidRun, validate
from normexp.corpora import PreparedCorpus, prepare
from normexp.corpora.prepared import recorded_corpus
from normexp.errors import UserError
from normexp.files import read_json, require_writable, write_json
from normexp.paths import REPOSITORY
from normexp.runs import advice, provenance, records
from normexp.runs.archive import make_way
from normexp.runs.evidence import refuse_evidence
from normexp.runs.folder import RunFolder, open_run
from normexp.runs.lookup import already, find_finished, is_final
from normexp.runs.metric_values import unknown_values
from normexp.runs.records import Asked, Outcome, Record
from normexp.training import preemption, process_group, warmups
from normexp.training.peak_memory import PeakMemory, larger
from normexp.training.process_group import Ranks

if TYPE_CHECKING:  # it imports fairseq, which takes seconds
    from normexp.training.loop import TrainingResult
    from normexp.training.progress import RunProgress

logger = logging.getLogger(__name__)


def run(settings: RunSettings) -> Record | None:
    """Do what the settings ask for, from where an earlier attempt stopped; return the record.

    A run that is complete is not repeated. Raises UserError for what the user can correct; a
    training that diverged is a result and returns a record that says so. Where torchrun or srun
    started several processes, rank 0 does all this; the others train with it and return None.
    """
    with (
        preemption.signals_handled(),
        process_group.joined() as ranks,
        _warnings_on_console(ranks.is_main),
    ):
        if not ranks.is_main:
            _train_as_worker(settings, ranks)
            return None
        valid = validate(settings)
        ranks.refuse_other_number(settings.distributed.ranks)
        try:
            record = _run_in_folder(settings, valid, ranks)
        except OSError as error:
            cure = advice.about_files(error, settings.run_dir)
            if cure is None:
                raise
            raise UserError(cure) from None
        ranks.succeeded = record.status == "complete"
        return record


def _train_as_worker(settings: RunSettings, ranks: Ranks) -> None:
    from normexp.training import loop

    sent = ranks.receive("training")
    languages = sent["languages"] and tuple(sent["languages"])
    fairseq_cfg = trainer_config(
        validate(settings).fairseq, Path(sent["data_bin"]), languages, Path(sent["checkpoints"])
    )
    with suppress(loop.Diverged):  # on all ranks: rank 0 records it
        loop.train(fairseq_cfg, None, [], settings.speed, settings.seeds, ranks)


def _run_in_folder(settings: RunSettings, valid: ValidRun, ranks: Ranks) -> Record:
    if found := find_finished(settings):
        say(already(found[0]))
        return found[1]
    refuse_evidence(settings)
    own_record = records.path_of_run(
        settings.results_dir, settings.task.name, settings.label, settings.seed
    )
    make_way(own_record, settings)
    with open_run(settings) as folder:
        earlier = _complete_record(folder, settings)
        if earlier is not None:
            return earlier
        require_writable(own_record.parent)  # records may lie on another disk than the run
        # The corpus is prepared before the log opens: its progress belongs on the console.
        corpus = prepare(
            settings.task.corpus,
            settings.data.dir,
            settings.data.local,
            splits=settings.evaluation.splits,
        )
        if corpus.kind != settings.task.kind:
            raise UserError(
                f"the corpus {corpus.name} is for {corpus.kind}, the task for "
                f"{settings.task.kind}: correct task.corpus or task.kind"
            )
        with _log_to(folder.log):
            return _run_with_corpus(settings, valid, corpus, folder, ranks)


def _run_with_corpus(
    settings: RunSettings, valid: ValidRun, corpus: PreparedCorpus, folder: RunFolder, ranks: Ranks
) -> Record:
    from normexp.evaluation.preflight import check_end_of_run
    from normexp.tracking.tracker import Tracker
    from normexp.training.progress import RunProgress

    asked = _asked(settings, valid.sites, corpus)
    check_end_of_run(settings, asked, corpus, folder)
    _refuse_other_data(folder, corpus)
    _write_environment(folder, asked)
    progress = RunProgress(f"{asked.task} {asked.label} seed {asked.seed}")
    progress.say(str(settings.run_dir))
    progress.say(", ".join(f"{site} {norm['name']}" for site, norm in valid.sites.items()))
    if valid.fairseq.ema.store_ema and settings.evaluation.checkpoint != "ema":
        progress.say(
            "the moving average of the weights (fairseq.ema) is kept in the checkpoints; "
            f"evaluation.checkpoint={settings.evaluation.checkpoint} is of the weights themselves"
        )
    for line in warmups.what_counts(valid.fairseq, valid.sites, ranks.size):
        progress.say(line)
    with (
        progress,
        Tracker.start(
            settings.tracking.mode,
            settings.tracking.project,
            folder.path,
            # At most 128 characters, of which the hash tells runs apart.
            run_id=f"{asked.task}-{asked.label}"[:100] + f"-{asked.seed}-{asked.config_hash}",
            name=settings.tracking.name,
            group=settings.tracking.group,
            tags=settings.tracking.tags,
            config=_for_the_dashboard(settings, asked),
        ) as tracker,
    ):

        def rank_failed(reason: str) -> None:
            _finish(folder, settings, asked, Outcome.without_result("failed", reason))
            tracker.finish(failed=True)

        ranks.on_failure = rank_failed
        try:
            outcome = _train_and_evaluate(settings, valid, corpus, folder, tracker, progress, ranks)
        except UserError:
            raise
        except Exception as error:
            logger.info("the run failed", exc_info=True)  # the console gets one line, or the error
            if ranks.is_lost_peer(error):
                raise UserError(
                    "another rank of this training was killed; the same command resumes from the "
                    "last checkpoint"
                ) from None
            if cure := advice.about_files(error, folder.path):
                raise UserError(cure) from None
            cure = advice.about_memory(error, settings, folder.finished.is_file())
            reason = cure or f"{type(error).__name__}: {error}"
            _finish(folder, settings, asked, Outcome.without_result("failed", reason))
            if cure:
                raise UserError(cure) from None
            raise
        record = _finish(folder, settings, asked, outcome)
        tracker.summarize(_flat(record))
    return record


def _train_and_evaluate(
    settings: RunSettings,
    valid: ValidRun,
    corpus: PreparedCorpus,
    folder: RunFolder,
    tracker: Any,
    progress: "RunProgress",
    ranks: Ranks,
) -> Outcome:
    """Train unless that is done, then evaluate: complete, or diverged with the step."""
    from normexp.evaluation.evaluate_run import evaluate_run
    from normexp.training import loop

    trained = _finished_training(folder)
    if trained is None:
        try:
            trained = _train(settings, valid, corpus, folder, tracker, progress, ranks)
        except loop.Diverged as diverged:
            return Outcome.without_result(
                "diverged",
                diverged.reason,
                diverged_at_update=diverged.update,
                diverged_site=diverged.site,
                num_updates=diverged.num_updates,
                curve=_curve(folder),
                notes=diverged.notes,
            )
        write_json(folder.finished, vars(trained))
        preemption.raise_if_signalled()
    progress.begin("evaluating")
    of_evaluation = PeakMemory()
    try:
        evaluated = evaluate_run(settings, folder, corpus)
    except store.Lost as lost:
        folder.finished.unlink()  # first: a kill must not leave it with too few checkpoints
        source = recovery.rewind_to_before(folder.checkpoints, lost)
        if ranks.size > 1:  # the others have trained to the end and left
            raise UserError(f"{lost}; the same command makes it again from {source}") from None
        logger.warning("%s; resuming from %s to make it again", lost, source)
        return _train_and_evaluate(settings, valid, corpus, folder, tracker, progress, ranks)
    logger.info("evaluated: %s", evaluated.checkpoint)
    unknown = unknown_values(evaluated.metrics)
    return Outcome(
        status="diverged" if unknown else "complete",
        reason=f"{', '.join(unknown)} of {evaluated.checkpoint} is not finite" if unknown else None,
        metrics=evaluated.metrics,
        curve=_curve(folder),
        sees_future_tokens=evaluated.sees_future_tokens,
        **vars(trained)
        | {
            "peak_memory_bytes": larger(trained.peak_memory_bytes, of_evaluation.read()),
            "peak_memory_of": "run",
        },
    )


def _train(
    settings: RunSettings,
    valid: ValidRun,
    corpus: PreparedCorpus,
    folder: RunFolder,
    tracker: Any,
    progress: "RunProgress",
    ranks: Ranks,
) -> "TrainingResult":
    from fairseq_cli import train as fairseq_train

    from normexp.runs.metrics_file import MetricsFile
    from normexp.training import finetuning, loop

    finetuning.refuse_changed_donor(settings)
    languages = None
    if corpus.kind == "translation":
        languages = corpus.source_language, corpus.target_language
    paths = {"data_bin": str(corpus.data_bin.absolute()), "checkpoints": str(folder.checkpoints)}
    fairseq_cfg = trainer_config(valid.fairseq, corpus.data_bin, languages, folder.checkpoints)
    _refuse_long_lines(settings, fairseq_cfg, corpus)
    ranks.publish("training", paths | {"languages": languages})
    with MetricsFile(folder.metrics) as metrics, progress.of_training(fairseq_train):
        sinks = [tracker, progress]
        return loop.train(fairseq_cfg, metrics, sinks, settings.speed, settings.seeds, ranks)


def _refuse_long_lines(settings: RunSettings, fairseq_cfg: Any, corpus: PreparedCorpus) -> None:
    """Raise UserError for a line that training, validation or evaluation would leave out."""
    from normexp.fairseq_plugin.long_lines import refuse_long_lines

    dataset = fairseq_cfg.dataset
    refuse_long_lines(fairseq_cfg, "train", dataset.max_tokens, "fairseq.dataset.max_tokens")
    key = "fairseq.dataset.max_tokens_valid"
    refuse_long_lines(fairseq_cfg, "valid", dataset.max_tokens_valid, key)
    for split in settings.evaluation.splits:
        limit, folder = settings.evaluation.max_tokens, corpus.data_bin_of(split)
        refuse_long_lines(fairseq_cfg, split, limit, "evaluation.max_tokens", folder)


def _curve(folder: RunFolder) -> list[tuple[int, float]]:
    """Return (update, validation loss per token in nats) pairs.

    fairseq logs bits, and the likelihood apart from a smoothed loss.
    """
    from normexp.runs.metrics_file import MetricsFile

    with MetricsFile(folder.metrics) as metrics:
        bits = metrics.values("valid", "nll_loss") or metrics.values("valid", "loss")
    return [(step, value * math.log(2)) for step, value in bits.items()]


def _finished_training(folder: RunFolder) -> "TrainingResult | None":
    """Read the result that training left when it ended; None where it has not or is unreadable."""
    from normexp.training.loop import TrainingResult

    try:
        if folder.finished.is_file():
            text = json.dumps(read_json(folder.finished))
            return TypeAdapter(TrainingResult).validate_json(text, strict=True)
        return None
    except ValueError as error:
        # A training that has ended finds its last checkpoint and ends at once.
        logger.warning("%s cannot be read (%s); looking at the training", folder.finished, error)
        return None


def _asked(settings: RunSettings, sites: Sites, corpus: PreparedCorpus) -> Asked:
    """Collect the part of the record that is known before the run starts."""
    commit, dirty = provenance.code_version(REPOSITORY)
    parallel = settings.distributed
    return Asked(
        task=settings.task.name,
        kind=settings.task.kind,
        norm=settings.norm.name,
        label=settings.label,
        seed=settings.seed,
        sites=sites,
        ranks=parallel.ranks,
        statistics=parallel.statistics if parallel.ranks > 1 else None,
        hardware=provenance.hardware_facts(),
        versions=provenance.package_versions(),
        code_commit=commit,
        code_dirty=dirty,
        command=provenance.command_for_a_shell(settings),
        config=settings.experiment(),
        config_hash=config_hash(settings),
        corpus=corpus.for_record(),
        budget=marked_budget(settings),
        departures=settings.departures,
    )


def _write_environment(folder: RunFolder, asked: Asked) -> None:
    environment = ("hardware", "versions", "code_commit", "code_dirty", "corpus")
    write_json(folder.environment, {key: getattr(asked, key) for key in environment})


def _refuse_other_data(folder: RunFolder, corpus: PreparedCorpus) -> None:
    """Raise UserError where a training that has begun would go on, or be scored, on other data."""
    if not (folder.finished.is_file() or any(folder.checkpoints.glob("*.pt"))):
        return
    try:
        earlier = recorded_corpus(read_json(folder.environment)["corpus"])
    except (ValueError, LookupError, TypeError, UserError):  # of an earlier version, or damaged
        return
    if difference := corpus.difference_from(earlier):
        raise UserError(
            f"{folder.path} was trained on other data: {difference}; restore them, or move the "
            "folder away to train anew"
        )


def _finish(folder: RunFolder, settings: RunSettings, asked: Asked, outcome: Outcome) -> Record:
    record = Record.of(asked, outcome, provenance.utc_now())
    _publish(record, settings.results_dir)
    records.write_record(folder.record, record)  # last: it is the sign of completion
    return record


def _publish(record: Record, results_dir: Path) -> None:
    records.write_record(records.record_path(results_dir, record), record)


def _complete_record(folder: RunFolder, settings: RunSettings) -> Record | None:
    """Return the record of a run that needs nothing more.

    A failed one is tried again, and one of another evaluation evaluated again.
    """
    if not folder.record.is_file():
        return None
    try:
        record = records.read_record(folder.record)
    except UserError as error:
        logger.warning("%s; the run is evaluated again", error)
        return None
    if not is_final(record) or record.config_hash != config_hash(settings):
        return None
    _publish(record, settings.results_dir)  # somebody removed it from among the results
    say(already(folder.record))
    return record


def _for_the_dashboard(settings: RunSettings, asked: Asked) -> dict[str, Any]:
    """Return W&B's config: on top what one filters and groups by, below the complete settings."""
    handles = ("task", "kind", "norm", "label", "seed", "config_hash", "budget", "corpus")
    origin = ("code_commit", "code_dirty", "command", "hardware", "versions", "sites")
    return {name: getattr(asked, name) for name in (*handles, *origin)} | {
        "experiment": settings.model_dump(mode="json", exclude={"task", "norm"}),
        "task_config": settings.task.model_dump(),
        "norm_config": settings.norm.model_dump(),
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


@contextmanager
def _warnings_on_console(wanted: bool) -> Iterator[None]:
    """Print warnings on standard error.

    A handler of the root logger also keeps fairseq from logging to standard output.
    """
    console = logging.StreamHandler(sys.stderr) if wanted else logging.NullHandler()
    console.setLevel(logging.WARNING)
    console.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    # Python warnings are of torch and fairseq about each other: they go to the log.
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
