"""Upload of offline runs: what is sent, in which order, once; by W&B's client to a local server."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import wandb
from support.wandb_server import KEY

from normexp.errors import UserError
from normexp.tracking import offline
from normexp.tracking.offline import UploadError, check_connection, find_offline_runs, upload
from normexp.tracking.tracker import Tracker

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "sync_wandb.py"


def log_part(folder: Path, run_id: str, steps: tuple[int, ...]) -> None:
    """What one process of a run leaves."""
    about = {"run_id": run_id, "name": "PN-seed1", "group": "toy", "tags": [], "config": {}}
    with Tracker.start("offline", "normexp", folder, **about) as tracker:
        for step in steps:
            tracker("valid", step, {"loss": 10.0 - step})


@pytest.fixture
def runs(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, isolated_wandb: None) -> Path:
    """Run a in two parts, run b in one; logged once and copied for every test."""
    logged = tmp_path_factory.getbasetemp() / "logged_offline"
    if not logged.exists():
        log_part(logged / "toy/a", "a", (2, 4, 6))
        log_part(logged / "toy/a", "a", (8, 10))
        log_part(logged / "toy/b", "b", (1, 2))
        wandb.teardown()  # what W&B has read of the environment
    return shutil.copytree(logged, tmp_path / "runs", symlinks=True)


def synchronize(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_uploading_again_and_again_sends_everything_once(runs, wandb_server):
    refused = []

    def refuse_the_first_time(path, body):
        first = path.endswith("/a/file_stream") and wandb_server.runs["a"].steps and not refused
        if first:  # the second part of run a
            refused.append(path)
        return 403 if first else None

    wandb_server.refuse = refuse_the_first_time
    shown = synchronize(runs, "--dry-run")
    assert shown.returncode == 0 and "3 parts of 2 runs to upload" in shown.stdout
    assert [line.split(":")[0] for line in shown.stdout.split("\n")[1:-1]] == [
        "[1/3] toy/a, part 1 of 2",
        "[2/3] toy/a, part 2 of 2",
        "[3/3] toy/b, part 1 of 1",
    ]
    assert not wandb_server.posts

    shown = synchronize(runs)
    assert shown.returncode == 1
    assert "[2/3] toy/a, part 2 of 2: not uploaded (ERROR" in shown.stderr
    assert "error: not uploaded: toy/a; the same command tries again" in shown.stderr
    assert "Traceback" not in shown.stderr
    assert wandb_server.runs["a"].steps == [2, 4, 6]
    assert wandb_server.runs["b"].steps == [1, 2]

    shown = synchronize(runs)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.split("\n")[0].startswith("1 parts of 1 runs")
    run = wandb_server.runs["a"]
    assert run.steps == [2, 4, 6, 8, 10]
    assert [line["valid/loss"] for line in run.history.values()] == [8.0, 6.0, 4.0, 2.0, 0.0]
    assert run.summary["valid/loss"] == {"min": 0.0}
    assert (run.about["displayName"], run.about["groupName"]) == ("PN-seed1", "toy")

    posts = len(wandb_server.posts)
    shown = synchronize(runs)
    assert shown.returncode == 0 and "0 parts of 0 runs" in shown.stdout
    assert len(wandb_server.posts) == posts
    assert not list(Path().glob("wandb")), "W&B's own log is left in the working folder"


def test_an_upload_that_was_cut_is_made_anew(runs, wandb_server):
    """Killed after the data have arrived: W&B's mark is there, but nobody has seen the outcome."""
    [run, _] = find_offline_runs([runs])
    first, second = run.logs
    upload(first)
    offline._begun(first).touch()
    [run, _] = find_offline_runs([runs])
    assert run.waiting == (first, second)
    for log in run.waiting:
        upload(log)
    assert run.waiting == ()
    assert wandb_server.runs["a"].steps == [2, 4, 6, 2, 4, 6, 8, 10]  # equal lines, appended
    assert wandb_server.runs["a"].summary["valid/loss"] == {"min": 0.0}


def test_parts_are_uploaded_in_the_order_of_their_start(runs):
    assert [(run.run_id, len(run.logs)) for run in find_offline_runs([runs])] == [
        ("a", 2),
        ("b", 1),
    ]
    [run, _] = find_offline_runs([runs, runs / "toy/a", runs / "toy"])  # each once
    assert list(run.logs) == sorted(run.logs, key=lambda log: log.stat().st_mtime)
    [alone] = find_offline_runs([run.logs[1].parent])
    assert alone.logs == (run.logs[1],)
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        find_offline_runs([runs / "nowhere"])


def test_a_run_that_is_being_written_is_left_alone(runs):
    with open(runs / "toy/a/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shown = synchronize(runs, "--dry-run")
    assert "toy/a: still being written" in shown.stdout
    assert "1 parts of 1 runs to upload" in shown.stdout
    [run, _] = find_offline_runs([runs])
    assert not run.is_being_written  # the lock is free again


def test_what_a_killed_process_left(runs, wandb_server):
    """Nothing, if it came before the first flush; else all that is whole."""
    [a, _] = find_offline_runs([runs])
    os.truncate(a.logs[0], 7)
    os.truncate(a.logs[1], a.logs[1].stat().st_size - 400)
    [a, _] = find_offline_runs([runs])
    assert a.waiting == a.logs[1:]
    upload(a.logs[1])
    assert wandb_server.runs["a"].steps[0] == 8
    assert a.waiting == ()


def test_two_uploads_of_the_same_part_do_not_meet(runs, wandb_server):
    [_, run] = find_offline_runs([runs])
    with (
        offline._holding(offline._begun(run.logs[0])),
        pytest.raises(UploadError, match="another process"),
    ):
        upload(run.logs[0])
    assert not wandb_server.posts
    upload(run.logs[0])
    assert wandb_server.runs["b"].steps == [1, 2]


def test_without_a_network_the_script_says_so_and_marks_nothing(runs):
    for environment, message in (
        ({}, "no API key"),
        ({"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}, "does not answer"),
    ):
        shown = synchronize(runs, **environment)
        assert shown.returncode == 1 and message in shown.stderr
        assert shown.stderr.count("\n") == 1
    assert sum(len(run.waiting) for run in find_offline_runs([runs])) == 3


def test_a_wrong_key_is_reported(runs, wandb_server):
    wandb_server.refuse = lambda path, body: 401
    check_connection()
    [_, run] = find_offline_runs([runs])
    with pytest.raises(UploadError, match="ERROR"):
        upload(run.logs[0])
    assert run.waiting == run.logs


def test_the_other_grammar_is_refused() -> None:
    shown = synchronize("dry_run=true")
    assert shown.returncode == 2 and "write --dry-run" in shown.stderr
