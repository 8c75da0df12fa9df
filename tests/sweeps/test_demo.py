"""The demo: two processes, lines of both, how far all runs are, and the exit status."""

import json
import re
from pathlib import Path

import pytest

from normexp.runs.folder import RunFolder
from normexp.sweeps import demo
from normexp.sweeps.sweep import runs_of_sweep

STUB = """
import os, sys, time
time.sleep(0.6)
print(os.environ["OMP_NUM_THREADS"], *sys.argv[1:])
print("to standard error", file=sys.stderr)
sys.exit("fail" in sys.argv[0] and "norm=power_v,power" in sys.argv)
"""


@pytest.mark.parametrize("fails", [False, True])
def test_lines_of_both_processes_and_their_status(tmp_path, monkeypatch, capfd, fails) -> None:
    stub = tmp_path / ("fail.py" if fails else "train.py")
    stub.write_text(STUB, encoding="utf-8")
    monkeypatch.setattr(demo, "TRAIN", stub)
    monkeypatch.setattr(demo, "LINE_SECONDS", 0.0)
    assert demo.run_demo(tmp_path / "results") == int(fails)
    lines = capfd.readouterr().out.splitlines()
    assert re.fullmatch(r"demo: 8 runs, 2 at a time, about \d minutes on 2 cores; .*", lines[0])
    for norms in demo.STREAMS:
        assert f"1 -m {demo.TASKS} {norms} results_dir={tmp_path}/results" in lines
    assert lines.count("to standard error") == 2
    (told, *_) = [line for line in lines[1:] if line.startswith("demo: ")]
    assert re.fullmatch(r"demo: 0%, 0 of 8 runs, about \d:\d\d left", told)


def test_the_time_left_follows_the_pace(tmp_path: Path) -> None:
    runs = runs_of_sweep([demo.TASKS, "norm=layer,batch,power_v,power", f"results_dir={tmp_path}"])
    work = sum(sum(demo.SECONDS[run.task.name]) for run in runs)
    assert demo._done(runs) == 0.0
    folder = RunFolder(runs[0].run_dir)
    folder.path.mkdir(parents=True)
    half = runs[0].fairseq["optimization"]["max_update"] // 2
    folder.metrics.write_text(json.dumps({"step": half, "time": 1.0}) + "\n{", encoding="utf-8")
    training, _ = demo.SECONDS[runs[0].task.name]
    assert demo._done(runs) == pytest.approx(training / 2)
    folder.finished.touch()
    assert demo._done(runs) == training
    # a quarter is done, half of that by this command within 100 seconds: 600 for the rest
    shown = demo._state(work / 4, work / 8, 100.0, runs)
    assert shown == "25%, 0 of 8 runs, about 10:00 left"
