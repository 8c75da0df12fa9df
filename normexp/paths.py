"""Paths of the repository's parts, and of what a user adds to them."""

import os
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


def own_folder() -> Path:
    """The folder of a user's own corpora and configurations, which git ignores.

    ``corpora/<name>/`` is written by scripts/add_corpus.py; ``configs/`` has Hydra's groups, as the
    repository's configs/ does. The environment variable NORMEXP_OWN_CORPORA names another folder.
    """
    return Path(os.environ.get("NORMEXP_OWN_CORPORA") or REPOSITORY / "data" / "own").absolute()
