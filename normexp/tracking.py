"""Weights & Biases tracking that never stops, delays or hangs a training run.

The run's own files (`metrics.jsonl`, the record) are the evidence; W&B is a view of them that a
run can do without. So whatever goes wrong here becomes one warning, tracking is off from then on,
and training goes on.
"""

import glob
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

from normexp.errors import UserError

logger = logging.getLogger(__name__)

MODES = ("offline", "online", "disabled")
INIT_TIMEOUT_SECONDS = 15.0
"""How long an unreachable server may delay the start of a run (W&B itself waits 90 s)."""
FINISH_TIMEOUT_SECONDS = 120.0
"""How long uploading may delay the end of a run (W&B itself waits forever); data stay on disk."""
SPARE_BYTES = 64 * 1024


class Tracker:
    """One W&B run as a context manager; does nothing in mode "disabled" or after a failure.

    An instance is also a metrics sink: `tracker("valid", 100, {"loss": 4.2})` logs `valid/loss`.
    Leaving the context finishes the run, as failed when an exception passes through.
    """

    def __init__(self, run: Any = None, run_dir: Path = Path(), first_step: int = 0) -> None:
        self._run = run
        self._run_dir = run_dir
        self._first_step = first_step

    @classmethod
    def start(
        cls,
        mode: str,
        project: str,
        run_dir: Path,
        run_id: str,
        name: str,
        group: str,
        tags: list[str],
        config: dict,
    ) -> Self:
        """Open the run `run_id` below `run_dir/wandb`, or resume it if it exists there.

        `online` without an API key or without a network becomes `offline` with one line of notice;
        nobody is ever asked for a key. Raises UserError for an unknown mode and nothing else.
        """
        if mode not in MODES:
            raise UserError(f"unknown tracking mode '{mode}'; choose one of {', '.join(MODES)}")
        if mode == "disabled":
            return cls()
        about = {
            "project": project,
            "id": run_id,
            "name": name,
            "group": group,
            "tags": tags,
            "config": config,
        }
        try:
            _check_writable(run_dir)
            last_step = _last_logged_step(run_dir, run_id)
            run = _open_run(mode, run_dir, about)
        except Exception as error:
            _warn("tracking is off, training goes on", error)
            return cls()
        # An online run that is resumed knows its last step from the server.
        return cls(run, run_dir, first_step=max(last_step + 1, run.starting_step))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log at a number of updates; steps before the last one logged are left out.

        After a resume the updates since the last checkpoint come a second time; W&B keeps the
        first occurrence.
        """
        if step < self._first_step:
            return
        self._first_step = step
        self._attempt(lambda: self._run.log(dict(metrics), step=step))

    def __call__(self, tag: str, step: int, values: Mapping[str, float]) -> None:
        self.log({f"{tag}/{name}": value for name, value in values.items()}, step)

    def summarize(self, metrics: Mapping[str, Any]) -> None:
        """Set values that describe the whole run, such as test BLEU."""
        self._attempt(lambda: self._run.summary.update(dict(metrics)))

    def finish(self, failed: bool = False) -> None:
        """Write what is pending and close the run; a second call does nothing."""
        if self._run is None:
            return
        self._attempt(lambda: self._run.finish(exit_code=int(failed)))
        # W&B cuts its file silently when the disk is full.
        if self._run is not None and shutil.disk_usage(self._run_dir).free < SPARE_BYTES:
            logger.warning("W&B: the disk is full, so this run's W&B log may be incomplete")
        self._run = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self.finish(failed=error_type is not None)

    def _attempt(self, action: Callable[[], object]) -> None:
        if self._run is None:
            return
        try:
            action()
        except Exception as error:
            self._run = None
            _warn("tracking is off from here on, training goes on", error)


def _warn(consequence: str, error: Exception) -> None:
    cause = textwrap.shorten(str(error), 300) or type(error).__name__
    logger.warning("W&B: %s (%s)", consequence, cause)


def _check_writable(run_dir: Path) -> None:
    """Raise OSError where W&B would silently write to the system's temporary folder instead."""
    (run_dir / "wandb").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=run_dir / "wandb") as probe:
        probe.write(bytes(SPARE_BYTES))


def _last_logged_step(run_dir: Path, run_id: str) -> int:
    """Last step in the logs that earlier processes of this run left in `run_dir`, else -1.

    Nothing is read back by W&B itself when an offline run is resumed.
    """
    identity = glob.escape(run_id)
    last = -1
    for log in (run_dir / "wandb").glob(f"*run-*-{identity}/run-{identity}.wandb"):
        inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json"]
        shown = subprocess.run([*inspect, str(log)], capture_output=True, text=True, timeout=60)
        if shown.returncode == 0:
            last = max(last, json.loads(shown.stdout).get("step") or -1)
    return last


def _open_run(mode: str, run_dir: Path, about: dict[str, Any]) -> Any:
    import wandb  # here, because it takes half a second and may not be installed

    wandb.setup(settings=wandb.Settings(silent=True))  # login() below would print
    settings = wandb.Settings(
        silent=True,
        console="off",
        init_timeout=INIT_TIMEOUT_SECONDS,
        finish_timeout=FINISH_TIMEOUT_SECONDS,
    )
    init = partial(wandb.init, dir=str(run_dir), resume="allow", settings=settings, **about)
    if mode == "online":
        try:
            if wandb.login(prompt=False, verify=False):
                run = init(mode="online")
                logger.info("W&B: %s", run.url)
                return run
            logger.warning("W&B: no API key, so this run is logged offline (see `wandb login`)")
        except Exception as error:
            _warn("no connection, so this run is logged offline", error)
            wandb.teardown()  # otherwise the run's id counts as in use
    run = init(mode="offline")
    logger.info("W&B: offline run in %s; `wandb sync` uploads it", run.settings.sync_dir)
    return run
