"""How far a training is, and that its output is never silent for long."""

import io
import math
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.small_runs import REPOSITORY, composed, script_command

from normexp import pipeline
from normexp.runs.records import read_record
from normexp.training import progress
from normexp.training.progress import RunProgress, position


def training(done: int, batches: int, freqs: list[int], **limits) -> tuple:
    """fairseq's configuration, trainer and iterator after `done` updates, counted one by one."""
    epoch, taken = 1, 0
    for _ in range(done):
        if taken >= batches:
            epoch, taken = epoch + 1, 0
        taken = min(batches, taken + freqs[min(epoch, len(freqs)) - 1])
    iterator = SimpleNamespace(epoch=epoch, iterations_in_epoch=taken)
    cfg = {"max_update": 0, "max_epoch": 0, "stop_time_hours": 0, "update_freq": freqs} | limits
    trainer = SimpleNamespace(get_num_updates=lambda: done, cumulative_training_time=lambda: 600.0)
    sized = type("Iterator", (SimpleNamespace,), {"__len__": lambda _: batches})
    return SimpleNamespace(optimization=SimpleNamespace(**cfg)), trainer, sized(**vars(iterator))


def all_updates(batches: int, freqs: list[int], max_epoch: int) -> int:
    return sum(
        len(range(0, batches, freqs[min(epoch, len(freqs)) - 1]))
        for epoch in range(1, max_epoch + 1)
    )


@given(
    batches=st.integers(1, 30),
    freqs=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    max_epoch=st.integers(1, 5),
    data=st.data(),
)
def test_updates_of_all_epochs_are_counted_from_any_place(batches, freqs, max_epoch, data) -> None:
    total = all_updates(batches, freqs, max_epoch)
    done = data.draw(st.integers(1, total))
    now = position(*training(done, batches, freqs, max_epoch=max_epoch), 10.0, 5)
    assert (now.update, now.total) == (done, total)
    assert now.seconds_left == pytest.approx((total - done) * 2.0)
    sooner = position(*training(done, batches, freqs, max_epoch=max_epoch, max_update=3), 10.0, 5)
    assert sooner.total == min(3, total)


def test_without_limits_nothing_is_promised() -> None:
    assert position(*training(7, 10, [1]), 10.0, 5).total is None
    # Counted for every update, so not epoch by epoch.
    assert position(*training(3, 10, [1, 5], max_epoch=10**15), 10.0, 5).total == 2 * 10**15 + 8
    assert position(*training(7, 10, [1]), 10.0, 5).seconds_left is None
    assert str(position(*training(7, 10, [1]), 10.0, 5)) == "update 7"
    timed = position(*training(7, 10, [1], stop_time_hours=1), 10.0, 5)
    assert timed.seconds_left == 3000.0
    # after the first update of a process no pace is known
    assert position(*training(7, 10, [1], max_update=9), 0.0, 0).seconds_left is None


def test_silence_is_broken_by_lines_with_the_name_of_the_run(monkeypatch, capsys) -> None:
    monkeypatch.setattr(progress, "SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(progress, "SILENCE_PART", 0.0)
    with RunProgress("toy LN seed 3") as shown:
        shown.begin("evaluating")
        time.sleep(1.8)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "toy LN seed 3: evaluating" and len(lines) >= 2
    assert all(
        re.fullmatch(r"toy LN seed 3: evaluating, 0:0\d since the start", x) for x in lines[1:]
    )
    time.sleep(0.8)
    assert not capsys.readouterr().out  # and no more after the run


@pytest.fixture
def small(overrides, little_text):
    data = f"data.dir={little_text}", "fairseq.optimization.max_epoch=4"
    return overrides("toy_language_model", *data, "evaluation.splits=[valid]")


def test_every_line_of_a_run_says_which_it_is(small, monkeypatch, capsys) -> None:
    monkeypatch.setattr(progress, "SILENCE_SECONDS", 0.0)
    pipeline.run(composed(*small, "norm=power", "seed=7", "fairseq.common.log_interval=1"))
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("toy_language_model PN seed 7: ") for line in lines)
    validated = [line for line in lines if "validation loss" in line]
    assert len(validated) == 4
    assert re.search(r"update 4, validation loss \d+\.\d+ bits, perplexity \d", validated[-1])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_with_the_time_left(small, monkeypatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr(progress, "REDRAW_SECONDS", 0.0)
    pipeline.run(composed(*small, "seed=8", "fairseq.common.log_interval=1"))
    shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", terminal.getvalue())
    assert re.search(
        r"toy_language_model LN seed 8 \S+ update 4 of 4, loss \d+\.\d+ bits, 0:00 left", shown
    )
    assert "toy_language_model LN seed 8: update 4, validation loss" in shown


def test_a_loss_that_is_not_a_number_is_shown(capsys) -> None:
    RunProgress("x")("valid", 3, {"loss": math.nan})
    assert capsys.readouterr().out == "x: update 3, validation loss nan bits, perplexity nan\n"


def test_a_reader_that_goes_away_ends_no_run(overrides, few_sentences_dir, tmp_path) -> None:
    """As with `train.py ... | head -1`."""
    command = overrides("toy_language_model", f"data.dir={few_sentences_dir}")
    script = script_command("train.py", few_sentences_dir / "catalogue.yaml")
    with subprocess.Popen(
        [sys.executable, *script, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
    ) as process:
        assert "LN seed 1: " in process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 0 and "Broken" not in said, said
    (path,) = (tmp_path / "results/records/toy_language_model").iterdir()
    assert read_record(path).status == "complete"
