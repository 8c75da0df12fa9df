"""Sweeps: what is done is not repeated, what is replaced is kept, and how all of it stands."""

import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
from support.small_runs import LABEL, composed, run_script, script_process, train_script

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


def test_a_result_is_never_replaced(settings, results, capsys) -> None:
    """Another configuration under the same label is refused before anything is touched."""
    first = pipeline.run(composed(*settings))
    folder = results / "runs" / TASK / "LN-seed1"
    before = contents(results)
    changed = composed(*settings, "fairseq.optimization.lr=[0.001]", "evaluation.beam=3")
    said = r"LN-seed1.json is of another configuration \(evaluation.beam: 5 -> 3, fairseq.opt"
    with pytest.raises(UserError, match=said):
        pipeline.run(changed)
    (results / "records" / TASK / "LN-seed1.json").unlink()
    del before[results / "records" / TASK / "LN-seed1.json"]
    with pytest.raises(UserError, match=r"LN-seed1 is of another configuration .*choose another"):
        pipeline.run(changed)
    assert contents(results) == before and not (results / "superseded").exists()
    assert pipeline.run(composed(*settings)) == first

    # An attempt without a result makes way, and is kept.
    (results / "records" / TASK / "LN-seed1.json").unlink()
    checkpoint = (folder / "checkpoints/checkpoint_last.pt").read_bytes()
    (folder / "record.json").unlink()
    capsys.readouterr()
    assert pipeline.run(changed).config_hash != first.config_hash
    (old_folder,) = (results / "superseded" / TASK).iterdir()
    assert (old_folder / "checkpoints/checkpoint_last.pt").read_bytes() == checkpoint
    said = capsys.readouterr().out
    assert said.index("archived: ") < said.index("LN seed 1: decoder"), "told before the training"


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file below a folder but the locks and command.txt, which each start touches."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files if path.name not in (".lock", "command.txt")}


def test_another_evaluation_does_not_train_again(settings, results, monkeypatch) -> None:
    first = pipeline.run(composed(*settings))
    monkeypatch.setattr(pipeline, "_train", lambda *_: pytest.fail("trained again"))
    second = pipeline.run(composed(*settings, "evaluation.max_tokens=4000"))
    assert second.config_hash != first.config_hash
    assert second.metrics["valid"] == pytest.approx(first.metrics["valid"])
    with pytest.raises(pytest.fail.Exception):  # it keeps other checkpoints
        pipeline.run(composed(*settings, "evaluation.average_last=1", "label=other"))


def test_every_run_of_a_sweep_keeps_its_result(overrides, results, little_text) -> None:
    """The issue's instance: two values of an option of the norm."""
    settings = overrides(
        TASK,
        f"data.dir={little_text}",
        "fairseq.optimization.max_update=1",
        "evaluation.splits=[valid]",
    )
    settings = [each for each in settings if each != LABEL]
    sweep = [*settings, "norm=power", "norm.options.alpha_fwd=0.8,0.95"]
    ended = train_script("-m", *sweep)
    assert ended.returncode == 0, ended.stderr
    made = records.load_records(results)
    assert len(made) == 2
    values = {record.config["norm"]["options"]["alpha_fwd"] for record in made.values()}
    assert values == {0.8, 0.95}
    for path, record in made.items():
        assert record.label.startswith("PN+alpha_fwd=0.") and path.stem == f"{record.label}-seed1"
    again = train_script("-m", *sweep)
    assert again.returncode == 0 and again.stdout.count("complete already: ") == 2
    assert records.load_records(results) == made
    listed = run_script("sweep_status.py", *sweep)
    assert listed.returncode == 0 and "2 runs: 2 done" in listed.stdout


def test_a_sweep_with_one_name_for_two_runs_does_not_start(overrides, results, little_text) -> None:
    sweep = overrides(TASK, "label=mine", "fairseq.optimization.lr=[0.1],[0.2]")
    ended = train_script("-m", *sweep)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"error: two runs of this sweep are {TASK} mine seed 1 (fairseq")
    assert not (results / "records").exists() and not (results / "runs").exists()


def test_record_alone_says_that_a_run_is_done(settings, results, capsys, monkeypatch) -> None:
    cfg = composed(*settings)
    record = pipeline.run(cfg)
    path = results / "records" / TASK / "LN-seed1.json"
    path.unlink()  # and it comes back from the run folder
    assert pipeline.run(cfg) == record == records.read_record(path)
    shutil.rmtree(results / "runs")
    monkeypatch.setattr(pipeline, "prepare", lambda *_, **__: pytest.fail("started again"))
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
    base = [f"results_dir={tmp_path}", "label=one"]
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
    old = settings.as_yaml().replace("speed:", "speed:\n  former_setting: 1")
    folder.config.write_text(old, encoding="utf-8")
    status = run_status.status_of(settings, {})
    assert status.state == "missing" and "speed.former_setting is unknown" in status.detail
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
