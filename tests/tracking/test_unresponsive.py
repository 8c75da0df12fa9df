"""Training goes on when W&B waits for ever: for itself, or for a service that does not answer."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from normexp.errors import UserError
from normexp.tracking import offline, tracker
from normexp.tracking.bounded_calls import BoundedCalls, Unresponsive
from normexp.tracking.tracker import Tracker

pytestmark = pytest.mark.usefixtures("isolated_wandb")
ABOUT = {"run_id": "r", "name": "n", "group": "g", "tags": [], "config": {}}

# A process of its own: what matters is also that it ends.
PROCESS = """
import os, signal, sys
from pathlib import Path
from normexp.tracking import tracker
from normexp.tracking.tracker import Tracker

tracker.START_TIMEOUT_SECONDS = {start}
tracker.CALL_TIMEOUT_SECONDS = tracker.GRACE_SECONDS = tracker.FINISH_TIMEOUT_SECONDS = 1.0

def services():
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == os.getpid() and "wandb-core" in (process / "cmdline").read_text():
                yield int(process.name)
        except OSError:
            pass

with Tracker.start({mode!r}, "p", Path(sys.argv[1]), "r", "n", "g", [], {{}}) as run:
    print("on" if run.is_on else "off")
    run.log({{"loss": 1.0}}, step=1)
    if {frozen}:
        [service] = services()
        os.kill(service, signal.SIGSTOP)
    run.summarize({{"status": "complete"}})
print("trained")
"""


def run(folder: Path, mode: str = "offline", start: float = 60.0, frozen: bool = False):
    code = PROCESS.format(mode=mode, start=start, frozen=frozen)
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=120
    )


def blocked_wandb(hanging: str) -> SimpleNamespace:
    """A stand-in for W&B, one of whose functions never returns."""

    def never(*_, **__):
        threading.Event().wait()

    def at_once(*_, **__):
        return SimpleNamespace(
            log=never if hanging == "log" else at_once,
            finish=never if hanging == "finish" else at_once,
            summary={},
            starting_step=0,
            url="",
            define_metric=at_once,
            settings=SimpleNamespace(sync_dir="", base_url="http://127.0.0.1:9"),
        )

    names = ("setup", "init", "login", "teardown")
    return SimpleNamespace(
        Settings=at_once, **{name: never if name == hanging else at_once for name in names}
    )


@pytest.mark.parametrize("hanging", ["setup", "init", "login", "log", "finish", "teardown"])
def test_a_call_that_never_returns_costs_one_line(tmp_path, monkeypatch, caplog, hanging) -> None:
    for limit in ("START_TIMEOUT", "CALL_TIMEOUT", "GRACE", "FINISH_TIMEOUT"):
        monkeypatch.setattr(tracker, f"{limit}_SECONDS", 0.05)
    monkeypatch.setitem(sys.modules, "wandb", blocked_wandb(hanging))
    with Tracker.start("online", "p", tmp_path, **ABOUT) as tracked:
        for step in range(3):
            tracked.log({"loss": 1.0}, step)
    [notice] = [record.getMessage() for record in caplog.records]
    assert "training continues" in notice and "no answer within" in notice


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_service_that_cannot_start_turns_tracking_off(tmp_path, monkeypatch, mode) -> None:
    """W&B 0.31.0 itself then waits for a lock that it holds, in `wandb.setup`."""
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "0.001")  # seconds until it counts as not started
    done = run(tmp_path, mode, start=3.0)
    assert (done.returncode, done.stdout) == (0, "off\ntrained\n")
    [notice] = done.stderr.splitlines()
    assert "tracking is off, training continues" in notice


def test_a_service_that_hangs_does_not_hold_the_process(tmp_path) -> None:
    done = run(tmp_path, frozen=True)
    assert (done.returncode, done.stdout) == (0, "on\ntrained\n")
    assert "tracking is off from here on, training continues" in done.stderr.splitlines()[0]
    assert "Traceback" not in done.stderr


def test_uploading_says_that_wandb_does_not_start(monkeypatch) -> None:
    monkeypatch.setattr(offline, "START_TIMEOUT_SECONDS", 0.05)
    monkeypatch.setitem(sys.modules, "wandb", blocked_wandb("setup"))
    with pytest.raises(UserError, match=r"W&B does not work here .*nothing is lost"):
        offline.check_connection()


def test_calls_are_made_in_order_and_pass_results_and_errors_on() -> None:
    calls, seen = BoundedCalls(), []
    assert calls(lambda: seen.append(1) or len(seen), 60.0) == 1
    with pytest.raises(ZeroDivisionError):
        calls(lambda: 1 / 0, 60.0)
    with pytest.raises(TimeoutError, match="its own"):
        calls(lambda: (_ for _ in ()).throw(TimeoutError("its own")), 60.0)
    with pytest.raises(Unresponsive, match=r"0\.01 s"):
        calls(lambda: time.sleep(0.5) or seen.append(2), 0.01)
    assert calls(lambda: seen.append(3) or seen, 60.0) == [1, 2, 3]
    calls.close()
