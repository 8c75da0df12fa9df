"""Weights & Biases tracking that never stops, delays or hangs a training run.

The run's own files (`metrics.jsonl`, the record) are the evidence; W&B is a view of them that a
run can do without. So any failure here becomes one warning, tracking is off from then on, and
training continues.
"""

import glob
import json
import logging
import math
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

from normexp.errors import UserError
from normexp.tracking.bounded_calls import BoundedCalls
from normexp.tracking.offline import is_offline, is_uploaded

logger = logging.getLogger(__name__)

MODES = ("offline", "online", "disabled")
INIT_TIMEOUT_SECONDS = 15.0
"""How long an unreachable server may delay the start of a run (W&B itself waits 90 s)."""
FINISH_TIMEOUT_SECONDS = 120.0
"""How long uploading may delay the end of a run (W&B itself waits forever); data stay on disk."""
START_TIMEOUT_SECONDS = 60.0
"""How long W&B in all may delay the start of a run, whatever it waits for: itself, for example."""
CALL_TIMEOUT_SECONDS = 30.0
"""How long W&B may take to accept a value, which it does in less than a millisecond."""
GRACE_SECONDS = 30.0
"""How long W&B may take to end itself, beyond the time that uploading may take."""
SPARE_BYTES = 64 * 1024
STEP = "num_updates"
"""The common x axis of all curves."""
BEST = {"valid/loss": "min", "valid/nll_loss": "min", "valid/ppl": "min", "valid/bleu": "max"}
"""Curves whose best value so far is in the summary, such as {"valid/loss": {"min": 3.5}}.

W&B can do that too, but starts anew when a run is resumed and lets NaN win.
"""


class Tracker:
    """One W&B run as a context manager; does nothing in mode "disabled" or after a failure.

    An instance is also a metrics sink: `tracker("valid", 100, {"loss": 4.2})` logs `valid/loss`.
    Leaving the context finishes the run: as failed when an exception passes through or the
    summary's `status` is not "complete". After an exception `status` is "failed", or "interrupted"
    when it was no error (a signal, Ctrl-C), and `reason` names it.
    """

    def __init__(
        self,
        run: Any = None,
        run_dir: Path = Path(),
        earlier: "_Earlier | None" = None,
        calls: BoundedCalls | None = None,
    ) -> None:
        self._calls = calls or BoundedCalls()
        self._run = run
        self._run_dir = run_dir
        self._first_step = 0 if earlier is None else earlier.last_step + 1
        self._best = {} if earlier is None else earlier.best
        self._status = "complete"

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
        job_type: str = "train",
    ) -> Self:
        """Open the run `run_id` below `run_dir/wandb`, or resume it if it exists there.

        `online` without an API key or without a network, or with earlier parts of the run that
        are not uploaded yet, becomes `offline` with a one-line notice; W&B never prompts for a
        key. Raises UserError for an unknown mode and no other error.
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
            "job_type": job_type,
        }
        try:
            _check_writable(run_dir)
            logs = _logs(run_dir, run_id)
            earlier = _read(logs)
            if mode == "online" and any(is_offline(log) and not is_uploaded(log) for log in logs):
                logger.warning(
                    "W&B: earlier parts of this run are not uploaded, so it goes on offline; "
                    "python scripts/sync_wandb.py uploads all of them in their order"
                )
                mode = "offline"

            def open_run() -> Any:
                run = _open_run(mode, run_dir, about)
                _define_curves(run)
                if logs:
                    resumed = {"status": "running", "reason": None}
                    run.summary.update(_nested(earlier.best) | resumed)
                return run

            calls = BoundedCalls()
            run = calls(open_run, START_TIMEOUT_SECONDS)
        except Exception as error:
            _warn("tracking is off, training continues", error)
            return cls()
        # An online run that is resumed knows its last step from the server.
        earlier.last_step = max(earlier.last_step, run.starting_step - 1)
        return cls(run, run_dir, earlier, calls)

    @property
    def is_on(self) -> bool:
        """Whether values are logged to a run."""
        return self._run is not None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log at a number of updates; steps before the last one logged are left out.

        After a resume the updates since the last checkpoint come a second time; W&B keeps the
        first occurrence.
        """
        if step < self._first_step:
            return
        self._first_step = step
        self._attempt(lambda: self._run.log({**metrics, STEP: step}, step=step))
        if better := _improve(self._best, metrics):
            self._attempt(lambda: self._run.summary.update(_nested(better)))

    def __call__(self, tag: str, step: int, values: Mapping[str, float]) -> None:
        self.log({f"{tag}/{name}": value for name, value in values.items()}, step)

    def summarize(self, metrics: Mapping[str, Any]) -> None:
        """Set values that describe the whole run, such as test BLEU."""
        self._status = metrics.get("status", self._status)
        self._attempt(lambda: self._run.summary.update(dict(metrics)))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table; a later one of the same name replaces it."""

        def log() -> None:
            import wandb

            self._run.log({name: wandb.Table(columns=list(columns), data=[list(r) for r in rows])})

        self._attempt(log)

    def finish(self, failed: bool = False) -> None:
        """Write what is pending and close the run; a second call does nothing."""
        if self._run is None:
            return
        self._attempt(
            lambda: self._run.finish(exit_code=int(failed)), FINISH_TIMEOUT_SECONDS + GRACE_SECONDS
        )
        # Now, because nothing limits how long W&B's own exit hook waits for its service.
        self._attempt(_end_wandb, GRACE_SECONDS)
        self._calls.close()
        # W&B cuts its file silently when the disk is full.
        if self._run is not None and shutil.disk_usage(self._run_dir).free < SPARE_BYTES:
            logger.warning("W&B: the disk is full, so this run's W&B log may be incomplete")
        self._run = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        if error_type is not None:
            status = "failed" if issubclass(error_type, Exception) else "interrupted"
            self.summarize({"status": status, "reason": f"{error_type.__name__}: {error}"})
        self.finish(failed=self._status != "complete")

    def _attempt(self, action: Callable[[], object], seconds: float | None = None) -> None:
        if self._run is None:
            return
        try:
            self._calls(action, CALL_TIMEOUT_SECONDS if seconds is None else seconds)
        except Exception as error:
            self._run = None
            _warn("tracking is off from here on, training continues", error)


def _warn(consequence: str, error: Exception) -> None:
    cause = textwrap.shorten(str(error), 300) or type(error).__name__
    logger.warning("W&B: %s (%s)", consequence, cause)


def _check_writable(run_dir: Path) -> None:
    """Raise OSError where W&B would silently write to the system's temporary folder instead."""
    (run_dir / "wandb").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=run_dir / "wandb") as probe:
        probe.write(bytes(SPARE_BYTES))


@dataclass
class _Earlier:
    """What earlier processes of a run logged: the last step, -1 for none, and the best values."""

    last_step: int = -1
    best: dict[str, float] = field(default_factory=dict)


def _logs(run_dir: Path, run_id: str) -> list[Path]:
    """W&B's files of a run that earlier processes left in `run_dir`."""
    identity = glob.escape(run_id)
    return sorted((run_dir / "wandb").glob(f"*run-*-{identity}/run-{identity}.wandb"))


def _read(logs: list[Path]) -> _Earlier:
    """Read what earlier processes logged; W&B does not when an offline run is resumed."""
    earlier = _Earlier()
    for log in logs:
        inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json"]
        shown = subprocess.run([*inspect, str(log)], capture_output=True, text=True, timeout=60)
        if shown.returncode != 0:
            continue
        content = json.loads(shown.stdout)
        earlier.last_step = max(earlier.last_step, content.get("step") or -1)
        summary = content.get("summary") or {}
        logged = {name: summary.get(name) for name in BEST}
        best = {name: x[BEST[name]] for name, x in logged.items() if isinstance(x, dict) and x}
        _improve(earlier.best, best)
    return earlier


def _improve(best: dict[str, float], values: Mapping[str, float]) -> dict[str, float]:
    """Update `best` with the values that are better, and return these."""
    better = {
        name: value
        for name in BEST.keys() & values.keys()
        if math.isfinite(value := values[name])
        and (name not in best or (value < best[name]) == (BEST[name] == "min"))
    }
    best.update(better)
    return better


def _nested(best: Mapping[str, float]) -> dict[str, dict[str, float]]:
    return {name: {BEST[name]: value} for name, value in best.items()}


def _define_curves(run: Any) -> None:
    run.define_metric(STEP, hidden=True, summary="none")
    run.define_metric("*", step_metric=STEP)
    for name in BEST:
        run.define_metric(name, step_metric=STEP, summary="none")


def _end_wandb() -> None:
    import wandb

    wandb.teardown()


def _open_run(mode: str, run_dir: Path, about: dict[str, Any]) -> Any:
    import wandb  # here, because it takes half a second and may not be installed

    settings = wandb.Settings(
        silent=True,
        console="off",
        init_timeout=INIT_TIMEOUT_SECONDS,
        finish_timeout=FINISH_TIMEOUT_SECONDS,
    )
    init = partial(wandb.init, dir=str(run_dir), resume="allow", settings=settings, **about)
    if mode == "online":
        try:
            wandb.setup(settings=wandb.Settings(silent=True))  # login() would print
            if wandb.login(prompt=False, verify=False):
                run = init(mode="online")
                logger.info("W&B: %s", run.url)
                return run
            logger.warning("W&B: no API key, so this run is logged offline (see `wandb login`)")
        except Exception as error:
            _warn("no connection, so this run is logged offline", error)
            wandb.teardown()  # otherwise the run's id counts as in use
    run = init(mode="offline")
    logger.info(
        "W&B: offline run in %s; python scripts/sync_wandb.py uploads it", run.settings.sync_dir
    )
    return run
