"""Damaged files lead to one line of error or to what can be had without them, never to a traceback.

Hypothesis draws the damage: values of other types, missing and unknown keys, cut and changed bytes.
A reader may raise UserError and nothing else. `thorough` draws more.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.damage import damaged_bytes, damaged_values, fuzzed
from support.small_runs import composed

from normexp import pipeline
from normexp.checkpoints import recovery, store
from normexp.config.validation import validate
from normexp.corpora import prepare
from normexp.corpora.catalogue import CATALOGUE, load_catalogue
from normexp.paths import RESULTS
from normexp.report.aggregate import rows_by_task
from normexp.report.benchmark_tables import load_benchmarks
from normexp.report.paper import load_paper
from normexp.report.result_tables import differences_table, results_table, runs_table
from normexp.runs.causality_record import load_causality_records
from normexp.runs.folder import RunFolder
from normexp.runs.metrics_file import MetricsFile
from normexp.runs.records import describe, load_records, read_record
from normexp.sweeps import run_status, slurm_queue

NUMBER_OF_EXAMPLES = 60


@pytest.fixture(params=[1, pytest.param(10, marks=pytest.mark.thorough)], ids=["few", "many"])
def examples(request) -> int:
    return NUMBER_OF_EXAMPLES * request.param


@pytest.fixture(scope="module")
def records() -> list[dict]:
    """A committed record of each kind of task."""
    found: dict[str, dict] = {}
    for path in sorted((RESULTS / "records").rglob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(content["kind"], content | {"curve": [[3, 2.5]]})
    return list(found.values())


@pytest.mark.parametrize("kind", [0, 1])
def test_records(records, tmp_path, examples, kind) -> None:
    paper = load_paper(RESULTS / "paper.yaml")
    content = records[kind]
    proper = tmp_path / "records" / content["task"] / "x.json"
    proper.parent.mkdir(parents=True)

    def read(damage: bytes) -> None:
        proper.write_bytes(damage)
        record = read_record(proper)
        describe(record)
        for task, rows in rows_by_task({proper: record}).items():
            results_table(task, rows, paper)
            differences_table(task, rows, paper)
            runs_table(rows)

    fuzzed(damaged_bytes(content), read, examples)


def test_records_that_lie_elsewhere(records, tmp_path, examples) -> None:
    proper = tmp_path / "records" / records[0]["task"] / "x.json"
    proper.parent.mkdir(parents=True)
    fuzzed(
        damaged_bytes(records[0]),
        lambda damage: (proper.write_bytes(damage), load_records(tmp_path)),
        examples // 2,
    )


def test_causality_records(tmp_path, examples) -> None:
    first = sorted((RESULTS / "causality").rglob("*.json"))[0]
    path = tmp_path / "causality" / "task" / "x.json"
    path.parent.mkdir(parents=True)
    fuzzed(
        damaged_bytes(json.loads(first.read_text(encoding="utf-8"))),
        lambda damage: (path.write_bytes(damage), load_causality_records(tmp_path)),
        examples,
    )


@pytest.mark.parametrize(
    "path", sorted((RESULTS / "benchmarks").glob("*.json")), ids=lambda p: p.stem
)
def test_benchmarks(path: Path, tmp_path, examples) -> None:
    copy = tmp_path / "benchmarks" / path.name
    copy.parent.mkdir()
    fuzzed(
        damaged_bytes(json.loads(path.read_text(encoding="utf-8"))),
        lambda damage: (copy.write_bytes(damage), load_benchmarks(tmp_path)),
        examples // 3,
    )


@pytest.mark.parametrize(
    ("path", "read"),
    [(CATALOGUE, load_catalogue), (RESULTS / "paper.yaml", load_paper)],
    ids=["catalogue", "paper"],
)
def test_yaml(path: Path, read: Callable, tmp_path, examples) -> None:
    text = path.read_text(encoding="utf-8")
    copy = tmp_path / path.name
    fuzzed(
        damaged_bytes(json.loads(json.dumps(yaml.safe_load(text))), text.encode()),
        lambda damage: (copy.write_bytes(damage), read(copy)),
        examples // 2,
    )


def test_the_jobs_of_a_sweep(tmp_path, examples, monkeypatch) -> None:
    monkeypatch.setattr(slurm_queue, "in_queue", lambda: None)
    path = tmp_path / "sweeps" / "one" / slurm_queue.JOBS
    path.parent.mkdir(parents=True)
    fuzzed(
        damaged_bytes({"results/runs/ptb/LN-seed1": {"job": "12_3", "errors": "x.err"}}),
        lambda damage: (path.write_bytes(damage), slurm_queue.jobs(tmp_path)),
        examples,
    )


LINES = [
    {"tag": "train_inner", "step": 1, "time": 1.5, "loss": 3.5, "ppl": None},
    {"tag": "valid", "step": 2, "time": 2.5, "loss": 3.25, "nll_loss": 3.0},
]


def test_metrics(tmp_path, examples) -> None:
    folder = RunFolder(tmp_path)

    def read(damage: bytes) -> None:
        whole = json.dumps(LINES[1]).encode() + b"\n"
        folder.metrics.write_bytes(whole + damage)
        run_status._progress(folder)
        folder.metrics.write_bytes(whole + damage + b"\n" + whole)
        run_status._progress(folder)
        folder.metrics.with_name("record.json").write_bytes(damage)
        assert folder.has_result() in (True, False)
        with MetricsFile(folder.metrics) as metrics:
            for name in ("loss", "nll_loss"):
                values = metrics.values("valid", name)
                assert all(isinstance(value, int | float) for value in values.values())
            metrics.truncate_after(5)

    for line in LINES:
        fuzzed(damaged_bytes(line), read, examples)


def test_the_end_of_a_training(tmp_path, examples) -> None:
    folder = RunFolder(tmp_path)
    ended = {
        "num_updates": 3,
        "num_epochs": 1,
        "num_parameters": 10,
        "tokens_per_second": 5.5,
        "wall_time_seconds": 2.5,
        "kernels": {"plain": 2},
        "notes": [],
        "peak_memory_bytes": 7,
    }

    def read(damage: bytes) -> None:
        folder.finished.write_bytes(damage)
        result = pipeline._finished_training(folder)
        assert result is None or (type(result.num_updates), type(result.kernels)) == (int, dict)

    folder.finished.write_text(json.dumps(ended), encoding="utf-8")
    assert vars(pipeline._finished_training(folder)) == ended
    fuzzed(damaged_bytes(ended), read, examples)


@pytest.mark.parametrize("task", ["toy_language_model", "toy_translation"])
def test_the_configuration_of_a_run_folder(task, tmp_path, examples) -> None:
    asked = composed(f"task={task}", "tracking=disabled")
    folder = RunFolder(tmp_path)

    def read(damage: bytes) -> None:
        folder.config.write_bytes(damage)
        folder.difference_from(asked)
        validate(folder.read_settings())

    whole = asked.model_dump(mode="json"), asked.as_yaml().encode()
    fuzzed(damaged_bytes(*whole), read, examples // 2)


@pytest.fixture(scope="module")
def corpus_folder(little_text: Path, tmp_path_factory) -> Path:
    prepare("toy_language_model", little_text, None, False)
    folder = tmp_path_factory.mktemp("corpora")
    shutil.copytree(little_text / "toy_language_model", folder / "toy_language_model")
    return folder / "toy_language_model"


@pytest.mark.parametrize("name", ["manifest.json", "raw/stage.json", "data-bin/stage.json"])
def test_the_records_of_a_corpus(corpus_folder: Path, little_text, examples, name: str) -> None:
    path, manifest = corpus_folder / name, corpus_folder / "manifest.json"
    whole = {file: file.read_bytes() for file in (path, manifest)}
    content = json.loads(whole[path])
    expected = json.loads(whole[manifest])

    def read(damage: bytes) -> None:
        if path != manifest:
            manifest.unlink(missing_ok=True)
        path.write_bytes(damage)
        try:
            corpus = prepare("toy_language_model", corpus_folder.parent, None, False)
            assert corpus.words("train") + corpus.tokens("test") > 0
            assert corpus.manifest["fingerprint"] == expected["fingerprint"]
        finally:
            for file, text in whole.items():
                file.write_bytes(text)

    fuzzed(damaged_bytes(content), read, examples // 3)


def test_checkpoints(tmp_path, examples) -> None:
    state = {
        "args": None,
        "cfg": {"model": {"_name": "normexp_transformer_lm", "dropout": 0.1}},
        "model": {"w": torch.ones(2)},
        "optimizer_history": [{"num_updates": 3, "optimizer_name": "adam"}],
        "extra_state": {"val_loss": 2.5, "best": 2.5, "train_iterator": {"epoch": 1}},
    }

    def read(damage: Any) -> None:
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        (tmp_path / "checkpoints").mkdir()
        for name in (store.LAST, "checkpoint1.pt"):
            torch.save(damage, tmp_path / "checkpoints" / name)
        found = recovery.latest_readable(tmp_path / "checkpoints")
        recovery.restore(tmp_path / "checkpoints", *found)
        store.average([tmp_path / "checkpoints" / "checkpoint1.pt"] * 2)

    fuzzed(damaged_values(state), read, examples)
