"""What runs have in common, so that a page of thousands of runs says it once and links to it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normexp.runs.records import Record


class Repeated:
    """Finds for each run an earlier one of the page that has the same machine, sites or settings.

    runs: in the order of the page.
    """

    def __init__(self, runs: Mapping[Path, Record]) -> None:
        self._first: dict[tuple[str, str], Path] = {}
        self._usual: dict[str, Path] = {}  # by task
        self._runs = runs
        self._settings: dict[str, dict[str, Any]] = {}  # of those, by task
        for path, run in runs.items():
            self._first.setdefault(("sites", _canonical(run.sites)), path)
            self._first.setdefault(("machine", _canonical([run.hardware, run.versions])), path)
            if run.task not in self._usual:
                self._usual[run.task] = path
                self._settings[run.task] = _flat(run.config)

    def sites(self, path: Path) -> Path | None:
        """Return the first run with the same sites; None if it is this one."""
        return self._earlier("sites", _canonical(self._runs[path].sites), path)

    def machine(self, path: Path) -> Path | None:
        """Return the first run with the same hardware and versions; None if it is this one."""
        run = self._runs[path]
        return self._earlier("machine", _canonical([run.hardware, run.versions]), path)

    def settings(self, path: Path) -> tuple[Path | None, dict[str, Any]]:
        """Return the first run of the task, and the settings that are other than its own.

        The settings have dotted keys; one that is missing here is "(absent)". (None, the whole
        configuration) for the first run itself, and where most settings are other ones.
        """
        run = self._runs[path]
        usual, own = self._settings[run.task], _flat(run.config)
        changed = {
            key: own.get(key, "(absent)")
            for key in sorted(usual.keys() | own.keys())
            if key not in usual or key not in own or repr(usual[key]) != repr(own[key])
        }
        if path == self._usual[run.task] or 2 * len(changed) > len(own):
            return None, run.config
        return self._usual[run.task], changed

    def _earlier(self, what: str, value: str, path: Path) -> Path | None:
        first = self._first[what, value]
        return None if first == path else first


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True)
