"""Paths of the repository's parts."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = REPOSITORY / "configs"
RESULTS = REPOSITORY / "results"
"""Committed records, tables and figures: evidence, which runs do not write."""

OWN_RESULTS = RESULTS / "own"
"""Where runs leave their results by default; git ignores it."""


def home_folder() -> Path | None:
    """Return the user's home folder; None for a user without one, as in many containers."""
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home if home.is_absolute() else None
