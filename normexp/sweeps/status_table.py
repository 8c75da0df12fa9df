"""The status of a sweep's runs as a table."""

from collections import Counter
from collections.abc import Sequence
from typing import get_args

from rich import box
from rich.table import Table
from rich.text import Text

from normexp.config import terminal
from normexp.sweeps.run_status import RunStatus, State

COLOURS: dict[State, str] = {
    "done": "green",
    "diverged": "magenta",
    "running": "cyan",
    "waiting": "blue",
    "failed": "red",
    "interrupted": "yellow",
    "missing": "dim",
}


def print_statuses(statuses: Sequence[RunStatus]) -> None:
    """Print one line per run on standard output, and the number of runs in each state."""
    console = terminal.console()
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("task", "label", "seed", "state", ""):
        table.add_column(name, justify="right" if name == "seed" else "left")
    for run in statuses:
        # Text, because square brackets are markup to rich.
        state = Text(run.state, style=COLOURS[run.state])
        table.add_row(Text(run.task), Text(run.label), str(run.seed), state, Text(run.detail))
    console.print(table)
    counts = Counter(run.state for run in statuses)
    shown = [f"{counts[state]} {state}" for state in get_args(State) if counts[state]]
    console.print(f"{len(statuses)} runs: {', '.join(shown)}")
