"""Where the parts of the repository lie."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = REPOSITORY / "configs"
RESULTS = REPOSITORY / "results"
