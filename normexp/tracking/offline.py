"""W&B's offline runs on disk: find them, and upload what is not uploaded.

An interrupted run has several parts with one id, folders `offline-run-<start>-<id>`. Each is
uploaded by its own call of `wandb sync`, because that command (all seen with wandb 0.31)

- takes the parts of a run in any order when it is given several, while the server appends;
- exits with status 0 when an upload failed, and even leaves its mark of success,
  `run-<id>.wandb.synced`, when the server refuses the data;
- waits for an unreachable server for more than a minute.
"""

import os
import subprocess
import sys
import tempfile
import textwrap
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from normexp.errors import UserError
from normexp.runs.folder import RunFolder
from normexp.tracking.bounded_calls import BoundedCalls

START_TIMEOUT_SECONDS = 60.0
CONNECT_TIMEOUT_SECONDS = 10.0
UPLOAD_TIMEOUT_SECONDS = 1800.0
_HEADER_BYTES = 7  # of W&B's file: all there is if a process was killed in its first 15 s
_RETRIED = ("GRAPHQL", "FILE_STREAM", "FILE_TRANSFER")


class UploadError(Exception):
    """A part could not be uploaded; the message gives W&B's reason."""


def is_offline(log: Path) -> bool:
    """Whether `run-<id>.wandb` was written offline."""
    return log.parent.name.startswith("offline-run-")


def is_uploaded(log: Path) -> bool:
    """Whether the upload of a part has succeeded, by this module or by `wandb sync`."""
    return _mark(log).exists() and not _begun(log).exists()


@dataclass(frozen=True)
class OfflineRun:
    """The parts of one run in the order in which they were written."""

    folder: Path  # of the run
    run_id: str
    logs: tuple[Path, ...]

    @property
    def name(self) -> str:
        """Task and label with seed, as in the path of the run folder."""
        return "/".join(self.folder.parts[-2:])

    @property
    def waiting(self) -> tuple[Path, ...]:
        """Parts to upload: those that are not uploaded and not empty."""
        return tuple(
            log for log in self.logs if not is_uploaded(log) and log.stat().st_size > _HEADER_BYTES
        )

    @property
    def is_being_written(self) -> bool:
        """Whether a process holds the run folder."""
        return RunFolder(self.folder).in_use()


def find_offline_runs(paths: Iterable[Path]) -> list[OfflineRun]:
    """All offline runs at or below these folders. Raises UserError for one that does not exist."""
    logs_of: dict[tuple[Path, str], set[Path]] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"no folder {path}; name run folders, or a folder that holds some")
        path = path.resolve()
        parts = [path] if path.name.startswith("offline-run-") else path.rglob("offline-run-*")
        for part in parts:
            for log in part.glob("run-*.wandb"):
                key = part.parents[1], log.name.removeprefix("run-").removesuffix(".wandb")
                logs_of.setdefault(key, set()).add(log)
    # The names of a run's parts differ by their time only.
    return [OfflineRun(*key, tuple(sorted(logs))) for key, logs in sorted(logs_of.items())]


def check_connection() -> None:
    """Raise UserError where W&B does not start, has no API key or no server that answers."""
    import wandb

    def address_and_key() -> tuple[str, bool]:
        url = wandb.setup(settings=wandb.Settings(silent=True)).settings.base_url
        return url, wandb.login(prompt=False, verify=False)

    calls = BoundedCalls()
    try:
        url, has_key = calls(address_and_key, START_TIMEOUT_SECONDS)
    except Exception as error:
        raise UserError(f"W&B does not work here ({error}); nothing is lost") from None
    calls.close()
    if not has_key:
        raise UserError(f"no API key for {url}; give one by `wandb login` or WANDB_API_KEY")
    try:
        urllib.request.urlopen(url, timeout=CONNECT_TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # an answer all the same
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"{url} does not answer ({reason}); nothing is lost, give the same command again "
            "where there is a network"
        ) from None


def upload(log: Path) -> None:
    """Upload one part by `wandb sync`, after an interruption again from its beginning.

    The server appends, so it then has the lines from before the interruption twice, with the same
    steps and values: curves and summary do not change.

    Raises UploadError where W&B reports a failure or another process is uploading the part.
    """
    sync = [sys.executable, "-m", "wandb", "sync", str(log.parent)]
    with _holding(_begun(log)), tempfile.TemporaryDirectory() as elsewhere:
        _mark(log).unlink(missing_ok=True)
        limits = {f"WANDB__{what}_RETRY_MAX": "3" for what in _RETRIED}
        environment = os.environ | limits | {"WANDB_DIR": elsewhere, "WANDB_SILENT": "false"}
        for name in ("WANDB_MODE", "WANDB_SERVICE"):  # they would change how it syncs
            environment.pop(name, None)
        try:
            done = subprocess.run(
                sync,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=elsewhere,  # W&B writes its own log to the working folder
                env=environment,
                timeout=UPLOAD_TIMEOUT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise UploadError(f"not done after {UPLOAD_TIMEOUT_SECONDS / 60:.0f} minutes") from None
        lines = [line.removeprefix("wandb: ").strip() for line in done.stdout.split("\n")]
        complaints = [line for line in lines if line.startswith(("ERROR", "Error"))]
        if complaints and all("ends with an incomplete record" in line for line in complaints):
            _mark(log).touch()  # of a killed process: there will never be more
        elif complaints or done.returncode != 0 or not _mark(log).exists():
            said = "; ".join(complaints or lines[-2:])
            raise UploadError(textwrap.shorten(said, 300) or f"status {done.returncode}")
        _begun(log).unlink()


def _mark(log: Path) -> Path:
    """The file that `wandb sync` creates after an upload."""
    return log.with_suffix(".wandb.synced")


def _begun(log: Path) -> Path:
    """A file that exists during an upload, and after one that failed."""
    return log.with_suffix(".wandb.uploading")


@contextmanager
def _holding(path: Path) -> Iterator[None]:
    """Hold a lock on the file `path`. Raises UploadError where another process holds it."""
    # No soft lock where the file system has no locks: a killed process would leave it behind.
    try:
        held = FileLock(path, fallback_to_soft=False).acquire(blocking=False)
    except Timeout:
        raise UploadError("another process is uploading it") from None
    with held:
        yield
