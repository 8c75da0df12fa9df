"""An archive of what unfinished runs with another configuration left, so that nothing is lost.

results/superseded/<task>/<name>.<time>/ is a former run folder, <name>.<time>.json a former record;
the time is that of archiving (UTC). Reports do not look there.
"""

import shutil
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from normexp.config.identity import config_hash, differences, is_same_training
from normexp.config.settings import ExperimentSettings, RunSettings, validated
from normexp.config.terminal import say
from normexp.errors import UserError
from normexp.runs.records import read_record

FOLDER = "superseded"
CURE = (
    "a result is not replaced: choose another label=, leave label out so that it follows the "
    "settings, or move the earlier result away"
)


def archive(path: Path, results_dir: Path, task: str, why: str) -> Path:
    """Move a run folder or a record to results/superseded/ and print so; returns its new path.

    The caller makes sure that nobody uses it. Raises UserError where it cannot be moved.
    """
    stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S.%fZ")
    suffix = path.suffix if path.is_file() else ""
    target = results_dir / FOLDER / task / f"{path.name.removesuffix(suffix)}.{stamp}{suffix}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)
    except OSError as error:
        raise UserError(
            f"cannot archive {path} as {target} ({error.strerror}): {why}; move it away"
        ) from None
    say(f"archived: {path} -> {target} ({why})")
    return target


def make_way(path: Path, settings: RunSettings) -> None:
    """Archive the record at `path`, where this run will leave its own, if it is of no other result.

    That is one which cannot be read, of an attempt that failed, or of the same training evaluated
    otherwise. Raises UserError where it is the result of another configuration.
    """
    if not path.exists():
        return
    try:
        earlier = read_record(path)
    except UserError:
        archive(path, settings.results_dir, settings.task.name, "it cannot be read")
        return
    if earlier.config_hash == config_hash(settings):
        return
    changed = f"configuration {earlier.config_hash}, now {config_hash(settings)}"
    same_training = False
    with suppress(UserError):  # settings that this version does not know
        was = validated(ExperimentSettings, earlier.config)
        changed, same_training = differences(was, settings), is_same_training(was, settings)
    if earlier.status != "failed" and not same_training:
        raise UserError(f"{path} is of another configuration ({changed}); {CURE}")
    archive(path, settings.results_dir, settings.task.name, changed)
