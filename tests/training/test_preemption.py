"""Signals save, requeue or exit; a run that resumes afterwards equals one without a signal."""

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from support.small_runs import SMALL, composed

from normexp import pipeline
from normexp.checkpoints import store
from normexp.evaluation import evaluate_run
from normexp.runs import records
from normexp.runs.folder import RunFolder
from normexp.runs.metrics_file import MetricsFile
from normexp.training import preemption

TASK = "toy_language_model"
UPDATES_PER_EPOCH = 18
NOT_REPEATED = ("time", "wall", "train_wall", "wps", "ups", "gb_free")


SETTINGS = [
    f"task={TASK}",
    *SMALL[TASK],
    "norm=power",
    "fairseq.dataset.max_tokens=300",
    "tracking=disabled",
    "task.norm_warmup_steps=20",
    "fairseq.common.log_interval=1",
    "fairseq.optimization.max_epoch=3",
    "fairseq.model.dropout=0.3",
    "+fairseq.dataset.validate_interval_updates=10",
    "evaluation.splits=[test]",
]


@pytest.fixture
def settings(tmp_path, little_text) -> list[str]:
    return [*SETTINGS, f"data.dir={little_text}", f"results_dir={tmp_path / 'results'}"]


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "results" / "runs" / TASK / "PN-seed1")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, little_text) -> RunFolder:
    """A run that gets no signal."""
    results = tmp_path_factory.mktemp("undisturbed")
    pipeline.run(composed(*SETTINGS, f"data.dir={little_text}", f"results_dir={results}"))
    return RunFolder(results / "runs" / TASK / "PN-seed1")


def signal_at(monkeypatch: pytest.MonkeyPatch, tag: str, step: int, number: int) -> None:
    """Send this process a signal at the moment at which something is logged."""
    log = MetricsFile.__call__

    def logged(self, at: str, update: int, values) -> None:
        log(self, at, update, values)
        if (at, update) == (tag, step):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(MetricsFile, "__call__", logged)


def curves(folder: RunFolder) -> list[dict]:
    entries = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k not in NOT_REPEATED} for entry in entries]


def last_checkpoint(folder: RunFolder) -> dict:
    return store.load(folder.checkpoints / "checkpoint_last.pt")


@pytest.mark.parametrize(
    ("tag", "step", "number", "saved_at"),
    [
        ("train_inner", 23, signal.SIGTERM, 23),
        ("train_inner", 30, signal.SIGUSR1, 30),  # a validation is due at this update
        ("valid", 20, signal.SIGUSR2, 20),  # while validating within an epoch
        # What belongs to the end of an epoch is done first, and the next one begun.
        ("train_inner", UPDATES_PER_EPOCH, signal.SIGTERM, UPDATES_PER_EPOCH + 1),
    ],
    ids=["within an epoch", "validation due", "validating", "end of an epoch"],
)
def test_signal_saves_and_the_run_goes_on_as_if_nothing_had_happened(
    tag, step, number, saved_at, settings, folder, undisturbed, monkeypatch
) -> None:
    before = signal.getsignal(number)
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as left:
        signal_at(patched, tag, step, number)
        pipeline.run(composed(*settings))
    assert left.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert not folder.record.exists() and not folder.in_use()
    assert last_checkpoint(folder)["optimizer_history"][-1]["num_updates"] == saved_at

    torch.manual_seed(999)
    resumed = pipeline.run(composed(*settings))
    straight = records.read_record(undisturbed.record)
    assert resumed.metrics == straight.metrics and resumed.curve == straight.curve
    assert curves(folder) == curves(undisturbed)
    state, expected = last_checkpoint(folder), last_checkpoint(undisturbed)
    for key, value in expected["model"].items():
        assert torch.equal(state["model"][key], value), key


def test_signal_while_evaluating_leaves_at_once(settings, folder, monkeypatch) -> None:
    def evaluate(*_) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("went on after the signal")

    with monkeypatch.context() as patched, pytest.raises(SystemExit, match=str(128 + 15)):
        patched.setattr(evaluate_run, "evaluate_run", evaluate)
        pipeline.run(composed(*settings))
    trained = folder.finished.read_bytes()
    assert pipeline.run(composed(*settings)).status == "complete"
    assert folder.finished.read_bytes() == trained


def test_signal_in_the_last_update_ends_before_the_evaluation(
    settings, folder, monkeypatch
) -> None:
    with monkeypatch.context() as patched, pytest.raises(SystemExit, match=str(128 + 12)):
        signal_at(patched, "train_inner", 3 * UPDATES_PER_EPOCH, signal.SIGUSR2)
        patched.setattr(evaluate_run, "evaluate_run", lambda *_: pytest.fail("evaluated"))
        pipeline.run(composed(*settings))
    assert folder.finished.is_file()


@pytest.fixture
def in_a_job(tmp_path, monkeypatch):
    """A process in a submitit job, with its handlers installed; lists the signals that requeued."""
    requeued = []

    def requeue(number: int, frame: object) -> None:
        requeued.append(number)
        os.kill(os.getpid(), signal.SIGTERM)  # so SLURM ends a job that is requeued
        sys.exit(-1)

    def squeue_says(state: str) -> None:
        (tmp_path / "squeue").write_text(f"#!/bin/sh\necho {state}\n")
        (tmp_path / "squeue").chmod(0o755)

    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    earlier = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGUSR2, requeue)
    yield SimpleNamespace(requeued=requeued, squeue_says=squeue_says)
    for number, handler in earlier.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "state", "requeued", "status"),
    [
        (signal.SIGUSR2, "RUNNING", [signal.SIGUSR2], -1),  # before the time limit
        (signal.SIGTERM, "RUNNING", [signal.SIGTERM], -1),  # preempted, with time to leave
        (signal.SIGTERM, "COMPLETING", [], 128 + 15),  # cancelled, or requeued by SLURM
    ],
)
def test_job_is_requeued_unless_slurm_ends_it(number, state, requeued, status, in_a_job) -> None:
    in_a_job.squeue_says(state)
    unwound = []
    with pytest.raises(SystemExit) as left, preemption.signals_handled():
        try:
            os.kill(os.getpid(), number)
            pytest.fail("went on after the signal")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # a second signal does not cut this short
            unwound.append(list(in_a_job.requeued))
    assert unwound == [[]], "requeued before the run was left"
    assert in_a_job.requeued == requeued
    assert left.value.code == status


def two_ranks(rank: int, folder: Path, number: int) -> None:
    from fairseq import checkpoint_utils

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2
    )
    checkpoint_utils.save_checkpoint = lambda *_: None
    loop = SimpleNamespace(validate_and_save=lambda *_: ([None], False))
    update = 0
    trainer = SimpleNamespace(device=torch.device("cpu"), get_num_updates=lambda: update)
    try:
        with preemption.signals_handled(), preemption.checkpoint_at_updates(loop):
            for update in range(1, 20):
                if rank == 1 and update == 7:
                    os.kill(os.getpid(), number)
                loop.validate_and_save(
                    SimpleNamespace(checkpoint=None), trainer, *[None] * 3, False
                )
    except SystemExit as left:
        (folder / str(rank)).write_text(f"{update} {left.code}")
    torch.distributed.destroy_process_group()


def test_ranks_stop_after_the_same_update(tmp_path) -> None:
    todo = tmp_path, int(signal.SIGUSR1)
    torch.multiprocessing.start_processes(two_ranks, todo, nprocs=2, start_method="fork")
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["7 138", "7 138"]
