"""The console that tables are printed on."""

import sys

from rich.console import Console


def console() -> Console:
    """Return one as wide as the terminal; a file or a pipe has no width that tables must fit."""
    return Console() if sys.stdout.isatty() else Console(width=200)
