"""A run killed or starved at its n-th operation on files ends as if nothing had happened.

fault_injection.py says why operations on files are all moments there are. NORMEXP_ALL_FAULTS=1
tries every one of them (an hour or two of one core) instead of a sample.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.small_runs import SMALL, composed

from normexp import pipeline
from normexp.errors import UserError

ALL = os.environ.get("NORMEXP_ALL_FAULTS") == "1"

COMMON = [
    "tracking=disabled",
    "norm=power",
    "task.norm_warmup_steps=5",
    "fairseq.model.dropout=0.3",
    "evaluation.splits=[test]",
    "evaluation.checkpoint=average",
    "evaluation.average_last=2",
]
# Gradients of two batches, bfloat16, a checkpoint per epoch; what fairseq drops is removed.
TRANSLATION = [
    *SMALL["toy_translation"],
    *COMMON,
    "task=toy_translation",
    "speed.precision=bfloat16",
    "fairseq.dataset.max_tokens=300",
    "fairseq.optimization.update_freq=[2]",
    "fairseq.optimization.max_epoch=3",
    "fairseq.common.log_interval=1",
]
# Checkpoints within epochs, an end in the middle of one, sums over several updates in the log.
LANGUAGE_MODEL = [
    *SMALL["toy_language_model"],
    *COMMON,
    "task=toy_language_model",
    "fairseq.dataset.max_tokens=600",
    "fairseq.optimization.max_update=19",
    "+fairseq.checkpoint.save_interval_updates=3",
    "+fairseq.checkpoint.keep_interval_updates=1",
    "fairseq.common.log_interval=2",
]


@pytest.fixture(scope="module")
def injected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Reports by name of the job, all made by one process: its imports take longer than a run."""
    folder = tmp_path_factory.mktemp("faults")

    def job(do: str, overrides: list[str], fault: str = "", size: int = 0) -> dict:
        return {
            "do": do,
            "fault": fault,
            "seed": 1,
            "size": None if ALL else size,
            "overrides": [*overrides, f"data.dir={folder / 'data'}"],
        }

    jobs = {
        "translation": job("inject", TRANSLATION, "kill", 6),
        "language model": job("inject", LANGUAGE_MODEL, "kill in the middle", 6),
        "again and again": job("kill_again_and_again", LANGUAGE_MODEL),
        "full disk": job("inject", TRANSLATION, "full disk", 3),
        # Longer than the others wait for the lock.
        "at once": job("at_once", [*LANGUAGE_MODEL, "fairseq.optimization.max_update=300"]),
    }
    (folder / "jobs.json").write_text(json.dumps(list(jobs.values())))
    done = subprocess.run(
        [sys.executable, Path(__file__).parents[1] / "support" / "fault_injection.py", folder],
        capture_output=True,
        text=True,
        timeout=None if ALL else 550,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(zip(jobs, json.loads((folder / "report.json").read_text()), strict=True))


@pytest.mark.timeout(0 if ALL else 600)
@pytest.mark.parametrize("name", ["translation", "language model"])
def test_killed_run_ends_as_an_uninterrupted_one(name, injected) -> None:
    """Metrics, weights, Adam, norm state, metrics.jsonl and translations, to the bit."""
    cases = injected[name]["cases"]
    files = {path for _, path in injected[name]["operations"]}
    for part in ("metrics.jsonl", "checkpoint_last.pt", "average.pt", "record.json", "config.yaml"):
        assert any(part in path for path in files), part
    assert cases
    for case in cases:
        assert case["killed"], case
        assert case["again"][0] == 0, case
        assert case["differences"] == [], (case["number"], case["operation"], case["differences"])


def test_killed_again_and_again(injected) -> None:
    report = injected["again and again"]
    assert len(report["kills"]) > 1 and report["code"] == 0, report["shown"]
    assert report["differences"] == [], report["kills"]


def test_full_disk_is_named_wherever_it_is_met(injected) -> None:
    for case in injected["full disk"]["cases"]:
        code, shown = case["failed"]
        if code != 0:  # a line of metrics alone does not stop a run
            errors = re.findall("^error: .*", shown, re.MULTILINE)
            assert code == 1 and "Traceback" not in shown, shown
            assert len(errors) == 1 and "no space left on the disk" in errors[0], shown
        assert case["again"][0] == 0, case["again"][1]
        if code != 0:
            assert case["differences"] == [], (case["operation"], case["differences"])


def test_of_three_at_once_one_runs(injected) -> None:
    report = injected["at once"]
    assert sorted(report["codes"]) == [0, 1, 1], report["shown"]
    for code, shown in zip(report["codes"], report["shown"], strict=True):
        assert ("error: " in shown) == bool(code)
        assert ("in use by another process: the same run is under way" in shown) == bool(code)


def test_read_only_disk_is_refused_before_any_work(tmp_path) -> None:
    disk, results = tmp_path / "disk", tmp_path / "results"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        results.mkdir()
        (results / "records").symlink_to(disk)
        for folder in (disk, results):  # the whole of it, and only that of the records
            paths = [f"data.dir={tmp_path / 'data'}", f"results_dir={folder}"]
            with pytest.raises(UserError, match=r"cannot write .*Read-only file system"):
                pipeline.run(composed(*LANGUAGE_MODEL, *paths))
        assert not (tmp_path / "data").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
