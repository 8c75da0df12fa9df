"""metrics.jsonl survives kills, resumes and a full disk."""

import json
import math
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normexp.runs.metrics_file import MetricsFile


def read(path: Path) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.split("\n")[:-1]]


def test_lines_are_complete_on_disk_before_the_file_is_closed(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    sink = MetricsFile(path)
    sink("train_inner", 10, {"loss": 5.5, "ppl": math.inf})
    sink("valid", 10, {"loss": math.nan})
    first, second = read(path)
    sink.close()
    assert first.pop("time") <= second.pop("time")
    assert first == {"tag": "train_inner", "step": 10, "loss": 5.5, "ppl": None}
    assert second == {"tag": "valid", "step": 10, "loss": None}


@settings(deadline=None)
@given(
    steps=st.lists(st.integers(0, 50), max_size=20).map(sorted),
    resumed=st.integers(0, 50),
    cut=st.integers(1, 30),
)
def test_resuming_after_a_kill_continues_from_the_resumed_step(
    tmp_path_factory, steps, resumed, cut
):
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    with MetricsFile(path) as sink:
        for step in [*steps, 60]:
            sink("train", step, {"loss": step / 7})
    before = read(path)
    os.truncate(path, path.stat().st_size - cut)  # the last line, of step 60, is half-written
    with MetricsFile(path) as sink:
        sink.truncate_after(resumed)
        sink("train", 61, {"loss": 1.0})
    *kept, last = read(path)
    assert last["step"] == 61
    # A cut of one byte takes the newline only: that line is whole.
    assert kept == [line for line in before if line["step"] <= resumed]


def test_a_line_that_only_lacks_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"tag": "train", "step": 1}', encoding="utf-8")
    with MetricsFile(path) as sink:
        sink("train", 2, {})
    assert [line["step"] for line in read(path)] == [1, 2]


def test_corrupt_lines_are_left_out_and_nothing_is_lost(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    good = '{"tag": "train", "step": 1}\n', '{"tag": "train", "step": 2}\n'
    damage = "rubbish\n", "\0\0\0\n", '{"step": 1}\n', "[]\n", "1\n"
    content = good[0] + "".join(damage) + good[1]
    path.write_text(content, encoding="utf-8")
    with MetricsFile(path) as sink:
        assert (
            f"5 lines are not lines of metrics and were left out; the file as it was is {path}"
            in (caplog.text)
        )
        assert path.read_text(encoding="utf-8") == "".join(good)
        sink.truncate_after(1)
        sink("valid", 1, {"loss": 2.0})
        assert sink.values("valid", "loss") == {1: 2.0}
    assert path.read_text(encoding="utf-8").startswith(good[0] + '{"tag": "valid"')
    assert (tmp_path / "metrics.jsonl.damaged").read_text(encoding="utf-8") == content


def test_a_full_disk_costs_lines_and_not_the_run(tmp_path, caplog):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        with MetricsFile(disk / "metrics.jsonl") as sink:
            for step in range(300):
                sink("train", step, {"loss": 1 / (step + 1)})
            lines = read(disk / "metrics.jsonl")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    assert 10 < len(lines) < 300
    assert [line["step"] for line in lines] == list(range(len(lines)))
    assert f"step {len(lines)} is not written (No space left on device)" in caplog.text


def test_what_was_logged_can_be_asked_for(tmp_path):
    with MetricsFile(tmp_path / "metrics.jsonl") as sink:
        sink("valid", 1, {"loss": 3.5})
        sink("train", 1, {"loss": 9.0})
        sink("valid", 2, {"loss": math.nan, "ppl": 8.0})
        sink("valid", 3, {"loss": 3.25})
        assert sink.values("valid", "loss") == {1: 3.5, 3: 3.25}
        assert sink.values("valid", "bleu") == {}
