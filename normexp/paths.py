"""Paths of the repository's parts."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = REPOSITORY / "configs"
RESULTS = REPOSITORY / "results"
