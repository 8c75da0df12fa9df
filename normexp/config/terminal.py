"""The console: tables as wide as it is, and lines whose reader may go away."""

import logging
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def say(line: str) -> None:
    """Print a line on standard output, in one piece and at once.

    What follows goes nowhere once nobody reads it, as behind `| head`: that ends no training.
    """
    try:
        sys.stdout.write(f"{line}\n")  # in one piece, because several runs may share the output
        sys.stdout.flush()
    except OSError:
        drop_output()


def drop_output() -> None:
    """Let standard output go nowhere, what is left in its buffer included."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def show_own_warnings() -> None:
    """Print warnings of this project as lines, and neither fairseq's notes nor Python's warnings,
    which are of torch and fairseq about each other. To be called before fairseq is imported."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").propagate = False


def console() -> "Console":
    """Return one as wide as the terminal; a file or a pipe has no width that tables must fit."""
    from rich.console import Console  # here, because a run without a table is in a hurry

    return Console() if sys.stdout.isatty() else Console(width=200)
