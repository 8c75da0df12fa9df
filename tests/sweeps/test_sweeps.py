"""Sweeps: what is done is not repeated, what is replaced is kept, and how all of it stands."""

import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
from support.small_runs import composed, run_script, script_process

from normexp import pipeline
from normexp.errors import UserError
from normexp.runs import folder as run_folder
from normexp.runs import records
from normexp.runs.folder import RunFolder, open_run
from normexp.sweeps import run_status, slurm_queue
from normexp.sweeps.slurm_queue import Job
from normexp.sweeps.sweep import runs_found, runs_of_sweep

TASK = "toy_language_model"


@pytest.fixture
def settings(overrides, little_text) -> list[str]:
    of_the_text = f"data.dir={little_text}", "evaluation.splits=[valid]"
    return overrides(TASK, *of_the_text, "fairseq.optimization.max_epoch=1")


@pytest.fixture
def results(tmp_path) -> Path:
    return tmp_path / "results"


def test_changed_configuration_runs_again_and_loses_nothing(settings, results, capsys) -> None:
    first = pipeline.run(composed(*settings))
    folder = results / "runs" / TASK / "LN-seed1"
    checkpoint = (folder / "checkpoints/checkpoint_last.pt").read_bytes()
    record = (results / "records" / TASK / "LN-seed1.json").read_bytes()
    capsys.readouterr()
    changed = composed(*settings, "fairseq.optimization.lr=[0.001]", "evaluation.beam=3")
    second = pipeline.run(changed)
    assert second.config_hash != first.config_hash
    assert records.load_records(results) == {results / "records" / TASK / "LN-seed1.json": second}
    aside = results / "superseded" / TASK
    (old_folder,) = (path for path in aside.iterdir() if path.is_dir())
    (old_record,) = aside.glob("*.json")
    assert (old_folder / "checkpoints/checkpoint_last.pt").read_bytes() == checkpoint
    assert old_record.read_bytes() == record
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("archived")]
    assert [str(old_folder) in said[0], str(old_record) in said[1]] == [True, True]
    assert "evaluation.beam: 5 -> 3, fairseq.optimization.lr: [0.004] -> [0.001]" in said[0]

    # and back again: the third does not overwrite what the first left
    third = pipeline.run(composed(*settings))
    assert third.metrics == first.metrics
    assert len(list(aside.iterdir())) == 4 and old_record.read_bytes() == record


def test_record_alone_says_that_a_run_is_done(settings, results, capsys, monkeypatch) -> None:
    cfg = composed(*settings)
    record = pipeline.run(cfg)
    path = results / "records" / TASK / "LN-seed1.json"
    path.unlink()  # and it comes back from the run folder
    assert pipeline.run(cfg) == record == records.read_record(path)
    shutil.rmtree(results / "runs")
    monkeypatch.setattr(pipeline, "prepare", lambda *_: pytest.fail("started again"))
    assert pipeline.run(cfg) == record
    assert f"complete already: {path}" in capsys.readouterr().out
    with pytest.raises(pytest.fail.Exception):
        pipeline.run(composed(*settings, "seed=2"))


def test_script_says_at_once_that_a_run_is_done(settings, results) -> None:
    pipeline.run(composed(*settings))
    again = script_process("train.py", "-m", *settings, "norm=layer", PYTHONPROFILEIMPORTTIME="1")
    assert again.returncode == 0 and "complete already" in again.stdout
    imported = {line.split("|")[-1].strip() for line in again.stderr.splitlines()}
    assert "hydra" in imported and not {"torch", "fairseq"} & imported


def test_folder_in_use_is_never_archived(tmp_path) -> None:
    base = [f"results_dir={tmp_path}"]
    with open_run(composed(*base)) as folder:
        config = folder.config.read_bytes()
        with (
            pytest.raises(UserError, match="in use by another process"),
            open_run(composed(*base, "fairseq.optimization.max_epoch=3")),
        ):
            pass
        assert folder.config.read_bytes() == config and folder.in_use()
    assert not folder.in_use()
    assert not (tmp_path / "superseded").exists()


def test_lock_of_a_folder_that_was_just_archived_does_not_count(tmp_path, monkeypatch) -> None:
    """Between opening and locking, another process may move the folder away."""
    folder = RunFolder(tmp_path / "run")
    moved = []

    def flock(file, operation: int) -> None:
        if not moved:
            moved.append(folder.path.rename(tmp_path / "aside"))
        original(file, operation)

    original = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", flock)
    with run_folder._lock(folder):
        assert folder.in_use() and not RunFolder(moved[0]).in_use()


def test_a_folder_of_another_version_is_archived_and_listed(tmp_path, capsys) -> None:
    """One whose settings this version does not know stops neither its run nor a status."""
    settings = composed(f"results_dir={tmp_path}", "tracking=disabled")
    folder = RunFolder(settings.run_dir)
    folder.path.mkdir(parents=True)
    old = settings.as_yaml().replace("evaluation:", "evaluation:\n  former_setting: 1")
    folder.config.write_text(old, encoding="utf-8")
    status = run_status.status_of(settings, {})
    assert status.state == "missing" and "evaluation.former_setting is unknown" in status.detail
    (found,) = runs_found(tmp_path)
    assert isinstance(found, UserError) and "former_setting" in str(found)
    with open_run(settings) as opened:
        assert opened.read_settings() == settings
    assert "another configuration" in capsys.readouterr().out
    (kept,) = (tmp_path / "superseded").rglob("config.yaml")
    assert kept.read_text(encoding="utf-8") == old


def test_an_invalid_run_of_a_sweep_hides_no_other() -> None:
    valid, invalid = runs_of_sweep(["task=toy_translation", "seed=1,0"])
    assert valid.seed == 1
    assert "seed=0: seed=0 must be an integer from 1" in str(invalid)
    shown = run_script("sweep_status.py", "task=toy_translation", "seed=1,0")
    assert shown.returncode == 1 and "1 runs: 1 missing" in shown.stdout
    assert shown.stderr.startswith("error: task=toy_translation seed=0: seed=0 must be")


def test_sweeps_are_expanded_as_hydra_does() -> None:
    def found(*overrides: str) -> list[tuple]:
        return [(r.task.name, r.label, r.seed) for r in runs_of_sweep(list(overrides))]

    # an experiment's own sweep, and the command line before it
    of_the_paper = ["LN", "BN", "PN-V", "PN", "BN-released", "PN-released-mt"]
    assert found("+experiment=table1_iwslt14") == [
        ("iwslt14", label, seed) for label in of_the_paper for seed in (1, 2, 3)
    ]
    assert found("+experiment=table1_iwslt14", "norm=power", "seed=range(4,6)") == [
        ("iwslt14", "PN", seed) for seed in (4, 5)
    ]
    both = runs_of_sweep(["+experiment=table2_ptb_tensorized", "norm=layer", "seed=1"])
    assert [r.label for r in both] == ["LN-published", "LN-causal"]
    assert found("task=ptb,multi30k", "norm=layer", "hydra/launcher=slurm") == [
        ("ptb", "LN", 1),
        ("multi30k", "LN", 1),
    ]
    with pytest.raises(UserError, match="norm/powr"):
        runs_of_sweep(["norm=powr,layer"])


def test_every_state_is_told(settings, results, tmp_path, monkeypatch) -> None:
    """A real run, and what its files would be had it gone otherwise."""
    record = pipeline.run(composed(*settings))
    path = results / "records" / TASK / "LN-seed1.json"
    folder = results / "runs" / TASK / "LN-seed1"

    def as_seed(seed: int, **changes) -> None:
        content = json.loads(path.read_text()) | {"seed": seed} | changes
        path.with_name(f"LN-seed{seed}.json").write_text(json.dumps(content))

    def begin(seed: int, *more: str) -> RunFolder:
        with open_run(composed(*settings, f"seed={seed}", *more)) as opened:
            shutil.copy(folder / "metrics.jsonl", opened.metrics)
        return opened

    as_seed(2, status="diverged", reason="loss is NaN in update 7")
    as_seed(3, status="failed", reason="CUDA out of memory")
    begin(5)
    begin(7, "fairseq.optimization.lr=[0.5]")
    errors = tmp_path / "log.err"
    own = "Traceback\nerror: norm.options.eps=-1 must be positive\n"
    errors.write_text(f"{own}srun: error: n1: task 0: Exited with exit code 1\n")
    folders = {seed: results / "runs" / TASK / f"LN-seed{seed}" for seed in (5, 6, 8, 9)}
    jobs = {str(path): {"job": f"12_{n}", "errors": str(errors)} for n, path in folders.items()}
    (results / "sweeps/then").mkdir(parents=True)
    (results / "sweeps/then" / slurm_queue.JOBS).write_text(json.dumps(jobs))
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho '12_6|PENDING|Resources'; echo '12_9|RUNNING|None'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    expected = {
        1: ("done", f"{record.num_updates} updates"),
        2: ("diverged", "loss is NaN in update 7"),
        3: ("failed", "CUDA out of memory"),
        4: ("running", f"update {record.num_updates}, "),
        5: ("interrupted", f"update {record.num_updates}, "),
        6: ("waiting", "SLURM job 12_6: Resources"),
        7: ("missing", "optimization.lr: [0.5] -> [0.004]"),
        8: ("failed", "SLURM job 12_8: error: norm.options.eps=-1 must be positive"),
        9: ("running", "SLURM job 12_9 running"),
        10: ("missing", ""),
    }
    with open_run(composed(*settings, "seed=4")) as held:
        shutil.copy(folder / "metrics.jsonl", held.metrics)
        arguments = [*settings, f"seed={','.join(map(str, expected))}"]
        shown = run_script("sweep_status.py", *arguments)
        listed = run_script("sweep_status.py", f"results_dir={results}")
    lines = [line.split(maxsplit=3) for line in shown.stdout.splitlines() if f" {TASK} " in line]
    assert [(task, label, int(seed)) for task, label, seed, _ in lines] == [
        (TASK, "LN", seed) for seed in expected
    ]
    for (*_, told), (state, detail) in zip(lines, expected.values(), strict=True):
        assert told.startswith(state) and detail in told
    counts = "1 done, 1 diverged, 2 running, 1 waiting, 2 failed, 1 interrupted, 2 missing"
    assert f"10 runs: {counts}" in shown.stdout
    assert shown.returncode == listed.returncode == 3
    # what lies there: four folders, the one of another configuration as it is itself
    assert "4 runs: 1 done, 1 running, 2 interrupted" in listed.stdout

    finished = run_script("sweep_status.py", *settings, "seed=1,2")
    assert finished.returncode == 0
    for arguments, message in (
        ([f"results_dir={tmp_path / 'nothing'}"], "error: no run folders below"),
        (["norm=powr"], "error: In 'train': Could not find 'norm/powr'"),
    ):
        shown = run_script("sweep_status.py", *arguments)
        assert shown.returncode == 1 and shown.stderr.startswith(message)


def test_run_that_slurm_still_has_is_not_given_up(settings, results) -> None:
    """Where the lock of another machine cannot be seen, the queue is believed."""
    cfg = composed(*settings)
    with open_run(cfg) as folder:
        pass
    job = Job("3", results / "log", "RUNNING", "None")
    assert run_status.status_of(cfg, {folder.path: job}).state == "running"
    assert run_status.status_of(cfg, {}).state == "interrupted"
