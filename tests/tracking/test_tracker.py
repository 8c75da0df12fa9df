"""What a W&B run contains, read back from disk, and that no failure of W&B reaches training."""

import json
import logging
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from support.wandb_server import KEY

from normexp.errors import UserError
from normexp.tracking import tracker
from normexp.tracking.offline import upload
from normexp.tracking.tracker import Tracker

pytestmark = pytest.mark.usefixtures("isolated_wandb")


def start(run_dir: Path, mode: str = "offline", **changes) -> Tracker:
    about = {
        "project": "normexp",
        "run_id": "toy-PN-1",
        "name": "toy PN seed 1",
        "group": "toy_translation",
        "tags": ["PN", "seed1"],
        "config": {"norm": {"name": "power", "alpha_fwd": 0.9}, "seed": 1},
    }
    return Tracker.start(mode=mode, run_dir=run_dir, **(about | changes))


def logs(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))


def history(records: dict) -> list[dict]:
    """What was logged; every entry has the common x axis as well."""
    assert all(
        entry["item"]["num_updates"] == entry["item"]["_step"] for entry in records["history"]
    )
    return [
        {name: value for name, value in entry["item"].items() if name not in PRIVATE}
        for entry in records["history"]
    ]


PRIVATE = ("_runtime", "_timestamp", "num_updates")


def notices(caplog) -> list[str]:
    """What the user is warned of; W&B's own records never reach the console."""
    ours = [record for record in caplog.records if record.name == "normexp.tracking.tracker"]
    return [record.getMessage() for record in ours if record.levelno >= logging.WARNING]


def test_offline_run_holds_what_was_logged(tmp_path, inspect):
    with start(tmp_path) as tracker:
        tracker("train_inner", 10, {"loss": 5.5, "ppl": 45.25})
        tracker("train", 20, {"loss": 4.5})
        tracker("valid", 20, {"loss": 4.75})
        tracker.log({"norm/encoder.layer_norm/psi2_mean": 1.5}, step=30)
        tracker.summarize({"test/bleu_tokenised": 35.87, "test/sacrebleu_signature": "nrefs:1"})
    [log] = logs(tmp_path)
    records, summary = inspect(log)
    assert history(records) == [
        {"_step": 10, "train_inner/loss": 5.5, "train_inner/ppl": 45.25},
        {"_step": 20, "train/loss": 4.5, "valid/loss": 4.75},
        {"_step": 30, "norm/encoder.layer_norm/psi2_mean": 1.5},
    ]
    [run] = records["run"]
    assert (run["run_id"], run["project"]) == ("toy-PN-1", "normexp")
    assert (run["run_group"], run["tags"]) == ("toy_translation", ["PN", "seed1"])
    assert run["job_type"] == "train"
    assert summary["name"] == "toy PN seed 1"
    assert summary["config"] == {"norm": {"name": "power", "alpha_fwd": 0.9}, "seed": 1}
    assert summary["summary"]["test/bleu_tokenised"] == 35.87
    assert summary["summary"]["test/sacrebleu_signature"] == "nrefs:1"
    assert (summary["state"], summary["exit_code"]) == ("finished", 0)


def test_a_run_left_by_an_exception_is_marked_as_failed(tmp_path, inspect):
    with pytest.raises(FloatingPointError), start(tmp_path) as tracker:
        tracker.log({"loss": float("nan")}, step=1)
        raise FloatingPointError("no number")
    [log] = logs(tmp_path)
    _, summary = inspect(log)
    assert (summary["state"], summary["exit_code"]) == ("failed", 1)
    assert summary["summary"]["status"] == "failed"
    assert summary["summary"]["reason"] == "FloatingPointError: no number"


def test_a_divergence_counts_as_failed(tmp_path, inspect):
    with start(tmp_path) as tracker:
        tracker.summarize({"status": "diverged", "reason": "loss is nan in update 7"})
    [log] = logs(tmp_path)
    _, summary = inspect(log)
    assert (summary["state"], summary["exit_code"]) == ("failed", 1)
    assert summary["summary"]["reason"] == "loss is nan in update 7"


def test_curves_share_their_axis_and_the_summary_has_the_best(tmp_path, inspect):
    with start(tmp_path) as tracker:
        for step, loss in ((1, 3.0), (2, 1.0), (3, float("nan")), (4, 2.0)):
            tracker("valid", step, {"loss": loss, "bleu": 10 * loss})
            tracker("train", step, {"loss": loss})
    [log] = logs(tmp_path)
    records, summary = inspect(log)
    defined = {x.get("name") or x["glob_name"]: x for x in records["metric"]}
    assert defined["*"]["step_metric"] == "num_updates"
    assert defined["valid/loss"]["step_metric"] == "num_updates"
    assert summary["summary"]["valid/loss"] == {"min": 1.0}
    assert summary["summary"]["valid/bleu"] == {"max": 30.0}
    assert summary["summary"]["train/loss"] == 2.0


def test_a_table_keeps_its_rows(tmp_path, inspect):
    with start(tmp_path, job_type="report") as tracker:
        tracker.table("results", ["label", "mean"], [["PN", 35.5], ["LN", None]])
    [log] = logs(tmp_path)
    records, summary = inspect(log)
    assert summary["summary"]["results"]["nrows"] == 2
    assert records["run"][0]["job_type"] == "report"
    [table] = log.parent.glob("files/media/table/results*.json")
    content = json.loads(table.read_text(encoding="utf-8"))
    assert content == {"columns": ["label", "mean"], "data": [["PN", 35.5], ["LN", None]]}


def test_a_resumed_run_logs_each_step_once(tmp_path, inspect):
    with pytest.raises(SystemExit), start(tmp_path) as tracker:
        for step in (2, 4, 6, 8):
            tracker("valid", step, {"loss": 1.0 + step, "bleu": 40.0 - step})
        raise SystemExit(143)
    with start(tmp_path) as tracker:  # from the checkpoint of update 4
        for step in (6, 8, 10, 12):
            tracker("valid", step, {"loss": 20.0 + step, "bleu": 40.0 - step})
        tracker.summarize({"status": "complete"})
    (first, interrupted), (second, complete) = (inspect(log) for log in logs(tmp_path))
    assert interrupted["state"] == "failed"
    assert interrupted["summary"]["status"] == "interrupted"
    assert interrupted["summary"]["reason"] == "SystemExit: 143"
    assert complete["state"] == "finished"
    assert complete["summary"]["status"] == "complete"
    assert complete["summary"].get("reason") is None
    # the best of both parts
    assert complete["summary"]["valid/loss"] == {"min": 3.0}
    assert complete["summary"]["valid/bleu"] == {"max": 38.0}
    assert [entry["_step"] for entry in history(first)] == [2, 4, 6, 8]
    assert [entry["_step"] for entry in history(second)] == [10, 12]
    assert second["run"][0]["run_id"] == first["run"][0]["run_id"]
    assert second["run"][0]["resume"]


def test_an_online_run_goes_on_where_it_stopped(tmp_path, wandb_server):
    with pytest.raises(SystemExit), start(tmp_path, mode="online") as tracker:
        for step in (2, 4, 6, 8):
            tracker("valid", step, {"loss": float(step)})
        raise SystemExit(143)
    run = wandb_server.runs["toy-PN-1"]
    assert (run.exit_code, run.summary["status"]) == (1, "interrupted")
    with start(tmp_path, mode="online") as tracker:  # from the checkpoint of update 4
        for step in (6, 8, 10, 12):
            tracker("valid", step, {"loss": float(step)})
        tracker.summarize({"status": "complete"})
    assert run.steps == [2, 4, 6, 8, 10, 12]
    assert (run.exit_code, run.summary["status"]) == (0, "complete")
    assert run.summary["valid/loss"] == {"min": 2.0}
    assert (run.about["groupName"], run.about["jobType"]) == ("toy_translation", "train")
    assert not logs(tmp_path)


def test_online_goes_on_offline_behind_parts_that_are_not_uploaded(
    tmp_path, wandb_server, caplog, inspect
):
    """The server appends what comes, so an online part must not come before an offline one."""
    for mode, step in (("offline", 2), ("online", 4)):
        with start(tmp_path, mode=mode) as tracker:
            tracker.log({"loss": 1.0}, step=step)
    [notice] = notices(caplog)
    assert "goes on offline" in notice and "sync_wandb.py" in notice
    assert [history(inspect(log)[0])[0]["_step"] for log in logs(tmp_path)] == [2, 4]
    assert not wandb_server.runs
    for log in logs(tmp_path):
        upload(log)
    with start(tmp_path, mode="online") as tracker:
        tracker.log({"loss": 1.0}, step=6)
    assert wandb_server.runs["toy-PN-1"].steps == [2, 4, 6]


def test_another_run_in_the_same_folder_starts_from_its_own_beginning(tmp_path, inspect):
    for run_id in ("a", "b"):
        with start(tmp_path, run_id=run_id) as tracker:
            tracker.log({"loss": 1.0}, step=5)
    assert [len(history(inspect(log)[0])) for log in logs(tmp_path)] == [1, 1]


def test_disabled_leaves_no_trace(tmp_path):
    with start(tmp_path, mode="disabled") as tracker:
        tracker.log({"loss": 1.0}, step=1)
        tracker.summarize({"bleu": 1.0})
    assert not (tmp_path / "wandb").exists()


def test_an_unknown_mode_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"'onlin'.*offline, online, disabled"):
        start(tmp_path, mode="onlin")


def test_online_without_a_key_is_logged_offline_with_one_notice(tmp_path, caplog, inspect):
    with start(tmp_path, mode="online") as run:
        run.log({"loss": 1.0}, step=1)
    [notice] = notices(caplog)
    assert "no API key" in notice
    [log] = logs(tmp_path)
    assert history(inspect(log)[0]) == [{"_step": 1, "loss": 1.0}]


def test_online_without_a_network_is_logged_offline(tmp_path, monkeypatch, caplog, inspect):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(tracker, "INIT_TIMEOUT_SECONDS", 2.0)
    with start(tmp_path, mode="online") as run:
        run.log({"loss": 1.0}, step=1)
    [notice] = notices(caplog)
    assert "logged offline" in notice and "connection refused" in notice
    [log] = logs(tmp_path)
    records, summary = inspect(log)
    assert history(records) == [{"_step": 1, "loss": 1.0}]
    assert summary["state"] == "finished"


@pytest.mark.parametrize("key", [None, KEY])
def test_a_terminal_is_never_asked_for_a_key(tmp_path, monkeypatch, key):
    if key is not None:
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("WANDB_API_KEY", key)
    script = (
        "from pathlib import Path; from normexp.tracking import tracker; "
        "from normexp.tracking.tracker import Tracker\n"
        "tracker.INIT_TIMEOUT_SECONDS = 2.0\n"
        f"Tracker.start('online', 'p', Path({str(tmp_path)!r}), 'id', 'n', 'g', [], {{}}).finish()"
    )
    master, slave = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", script], stdin=slave, stdout=slave, stderr=slave, timeout=300
        )
        shown = os.read(master, 100_000).decode()
    finally:
        os.close(slave)
        os.close(master)
    assert done.returncode == 0
    assert ("no connection" if key else "no API key") in shown
    assert "choice" not in shown
    assert len(logs(tmp_path)) == 1


@pytest.mark.parametrize(
    ("obstacle", "cause"), [("run", "Not a directory"), ("run/wandb", "File exists")]
)
def test_an_unwritable_folder_turns_tracking_off(tmp_path, monkeypatch, caplog, obstacle, cause):
    elsewhere = tmp_path / "tmp"  # where W&B would go of its own accord
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    blocked = tmp_path / obstacle
    blocked.parent.mkdir(exist_ok=True)
    blocked.write_text("a file where a folder should be", encoding="utf-8")
    with start(tmp_path / "run") as tracker:
        tracker.log({"loss": 1.0}, step=1)
    [notice] = notices(caplog)
    assert "tracking is off" in notice and cause in notice
    assert list(elsewhere.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small file system is not permitted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> None:
    with open(disk / "filler", "wb", buffering=0) as filler, pytest.raises(OSError):
        while True:
            filler.write(bytes(4096))


def test_a_full_disk_turns_tracking_off(small_disk, caplog):
    fill(small_disk)
    with start(small_disk) as tracker:
        tracker.log({"loss": 1.0}, step=1)
    [notice] = notices(caplog)
    assert "tracking is off" in notice and "No space left" in notice


def test_a_disk_that_fills_up_during_the_run_is_reported(small_disk, caplog):
    with start(small_disk) as tracker:
        fill(small_disk)
        for step in range(200):
            tracker.log({"loss": 1.0}, step=step)
    [notice] = notices(caplog)
    assert "disk is full" in notice


def test_after_an_error_of_wandb_the_run_goes_on_without_it(tmp_path, caplog):
    class Broken:
        calls = 0

        def log(self, *_, **__):
            self.calls += 1
            raise ConnectionResetError("Connection lost\nand a long story")

    broken = Broken()
    tracker = Tracker(broken, tmp_path)
    tracker.log({"loss": 1.0}, step=1)
    tracker.log({"loss": 1.0}, step=2)
    tracker.summarize({"bleu": 1.0})
    tracker.finish()
    assert broken.calls == 1
    [notice] = notices(caplog)
    assert notice.endswith("(Connection lost and a long story)")


def test_wandb_is_imported_only_when_it_is_used():
    script = (
        "import sys, normexp.tracking.tracker, normexp.runs.metrics_file, normexp.runs.records\n"
        "print({'torch', 'fairseq', 'wandb'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True) == "set()\n"
