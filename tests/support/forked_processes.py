"""Processes forked from the test's, which has done the imports that take seconds."""

import logging
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkProcess
from pathlib import Path

import fairseq_cli.train  # noqa: F401 (for the processes that are forked)
from hydra.core.global_hydra import GlobalHydra

import normexp.evaluation.causality
import normexp.evaluation.scores
import normexp.pipeline
import normexp.training.loop  # noqa: F401
from support.small_runs import REPOSITORY

TIMEOUT = 300  # seconds; a script takes a few


def start(
    printed: Path, work: Callable[[], object], environment: Mapping[str, str] | None = None
) -> ForkProcess:
    """Begin a process that does `work`, with its output in `printed`.out and `printed`.err"""
    todo = printed, work, environment or {}
    process = multiprocessing.get_context("fork").Process(target=_run, args=todo)
    process.start()
    return process


def run(work: Callable[[], object], **environment: str) -> subprocess.CompletedProcess:
    """Do `work` in a process of its own; returns what it printed and its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        printed = Path(folder) / "printed"
        process = start(printed, work, environment)
        process.join(TIMEOUT)
        hung = process.is_alive()
        process.kill()
        process.join()
        shown = [Path(f"{printed}.{stream}").read_text() for stream in ("out", "err")]
    assert not hung, f"{work} did not end: {shown}"
    return subprocess.CompletedProcess([], process.exitcode, *shown)


def script(
    name: str, *arguments: str, prepare: Callable[[], object] = lambda: None
) -> Callable[[], None]:
    """The work that a script of the project does, after prepare().

    What is patched in this process is patched there, too.
    """

    def work() -> None:
        os.chdir(REPOSITORY)
        path = str(REPOSITORY / "scripts" / name)
        sys.argv = [path, *map(str, arguments)]
        prepare()
        runpy.run_path(path, run_name="__main__")

    return work


def _run(printed: Path, work: Callable[[], object], environment: Mapping[str, str]) -> None:
    for descriptor, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{printed}.{stream}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.environ |= environment
    GlobalHydra.instance().clear()
    logging.getLogger().handlers.clear()  # pytest's
    code: object = 0
    try:
        work()
    except SystemExit as leaving:
        code = leaving.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)  # not pytest's own ending
