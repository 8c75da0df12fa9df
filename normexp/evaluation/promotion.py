"""Finished runs become evidence: their records are copied among the committed results.

A run is promoted with its translations, after what its record says has been checked again: the
code was committed, the corpus has the recorded hashes, the translations have the recorded BLEU.
"""

from collections.abc import Mapping
from pathlib import Path

from normexp.config.identity import config_hash
from normexp.config.settings import ExperimentSettings, RunSettings, validated
from normexp.corpora import prepare
from normexp.corpora.prepared import recorded_corpus
from normexp.errors import UserError
from normexp.evaluation import translations
from normexp.files import read_json, whole_file
from normexp.runs import records
from normexp.runs.causality_record import read_causality_record
from normexp.runs.folder import RunFolder, hold
from normexp.runs.records import Record

SMALL = 1e-9  # BLEU, 0 to 100: the same computation on the same text


def promote(path: Path, results: Path, replace: bool) -> list[Path]:
    """Copy a run, a causality record or a record of a benchmark; returns the files written.

    path: a run folder, or a JSON file in causality/<task>/ or benchmarks/. results: the folder of
    the committed results. replace: also over a committed record of the same name. Raises UserError
    for what is not fit to be evidence.
    """
    path = path.absolute()  # it may be a bare name
    if path.is_dir():
        return _promote_run(RunFolder(path), results, replace)
    if not path.is_file():
        raise UserError(f"{path} does not exist; name a run folder or a record")
    if path.parent.name == "benchmarks":
        return _promote_benchmark(path, results, replace)
    if path.parent.parent.name == "causality":
        record = read_causality_record(path)
        _refuse_modified_code(path, record.code_commit, record.code_dirty)
        target = results / "causality" / record.task / path.name
        return _copy_all({path: target}, replace)
    raise UserError(
        f"{path} is none of a run folder, a record in causality/ and one in benchmarks/; of a run "
        "name the folder"
    )


def rescored(
    record: Record, corpus_dir: Path, local: Path | None, folder: Path
) -> dict[str, records.Metrics]:
    """Return BLEU of the translations of a record in `folder`, by split.

    corpus_dir, local: as in `corpora.prepare`. Raises UserError where the corpus is not that of the
    record.
    """
    recorded = recorded_corpus(record.corpus)
    corpus = prepare(recorded.name, corpus_dir, local, splits=record.metrics)
    if difference := corpus.difference_from(recorded):
        raise UserError(difference)
    evaluation = record.config.get("evaluation")
    compound_split = isinstance(evaluation, dict) and bool(evaluation.get("compound_split"))
    return {
        split: translations.rescore(corpus, folder, split, compound_split)
        for split in record.metrics
    }


def translations_of(record: Record, results: Path) -> Path:
    """Return the folder of a record's committed translations."""
    name = records.record_path(results, record).stem
    return results / "translations" / record.task / name


def _promote_run(folder: RunFolder, results: Path, replace: bool) -> list[Path]:
    if not folder.record.is_file():
        raise UserError(f"{folder.path} has no record.json: the run is not finished")
    with hold(folder) as settings:
        return _promote_held_run(folder, settings, results, replace)


def _promote_held_run(
    folder: RunFolder, settings: RunSettings, results: Path, replace: bool
) -> list[Path]:
    record = records.read_record(folder.record)
    if record.status == "failed":
        raise UserError(f"{folder.path}: the run failed ({record.reason}); that is no evidence")
    named = (record.task, record.label, record.seed)
    hashes = {record.config_hash, config_hash(validated(ExperimentSettings, record.config))}
    own_name = (settings.task.name, settings.label, settings.seed)
    if named != own_name or hashes != {config_hash(settings)}:
        raise UserError(f"{folder.record} is of another configuration than {folder.config}")
    _refuse_modified_code(folder.path, record.code_commit, record.code_dirty)
    targets = {}
    if record.kind == "translation" and record.status == "complete":
        now = rescored(record, settings.data.dir, settings.data.local, folder.hypotheses)
        for split, metrics in now.items():
            for name, value in metrics.items():
                was = record.metrics[split].get(name)
                same = (
                    was == value
                    if isinstance(value, str)
                    else isinstance(was, float) and abs(value - was) <= SMALL
                )
                if not same:
                    raise UserError(
                        f"{folder.hypotheses}: {split} {name} is {value}, the record says {was}; "
                        "evaluate the run again"
                    )
            for name in (translations.TOKENISED, translations.DETOKENISED):
                source = folder.hypotheses / name.format(split=split)
                targets[source] = translations_of(record, results) / source.name
    targets[folder.record] = records.record_path(results, record)
    return _copy_all(targets, replace)


def _promote_benchmark(path: Path, results: Path, replace: bool) -> list[Path]:
    try:
        conditions = read_json(path)
        commit, modified = str(conditions["code_commit"]), conditions["code_dirty"]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is no record of a benchmark ({error})") from None
    _refuse_modified_code(path, commit, modified)
    return _copy_all({path: results / "benchmarks" / path.name}, replace)


def _refuse_modified_code(path: Path, commit: str, modified: bool | None) -> None:
    if modified is not False:
        raise UserError(
            f"{path} was made by code that differs from its commit {commit[:7]}, which nobody can "
            "repeat; commit the code and run it again"
        )


def _copy_all(targets: Mapping[Path, Path], replace: bool) -> list[Path]:
    """Copy files to their targets, all or, where one may not be replaced, none; return these."""
    for source, target in targets.items():
        if target.exists() and target.read_bytes() != source.read_bytes() and not replace:
            raise UserError(f"{target} is there and another; --replace puts {source} in its place")
    for source, target in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target, "wb") as file:
            file.write(source.read_bytes())
    return [*targets.values()]
