"""A norm written after docs/commands.md passes the tests as it stands there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
GUIDE = REPOSITORY / "docs" / "commands.md"
TESTS = [
    *(f"tests/norms/test_{part}.py" for part in ("references", "layer_docs", "arguments")),
    *(f"tests/norms/test_{part}.py" for part in ("padding", "invariances", "saving", "precision")),
    *(f"tests/norms/test_{part}.py" for part in ("fold_into_linear", "known_layers", "replace")),
    *("tests/config/test_configs.py", "tests/fairseq_plugin/test_model_norms.py"),
]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project with the norm of the guide in it."""
    for part in ("normexp", "configs", "tests", "data", "docs", "scripts", "results"):
        ignored = shutil.ignore_patterns("__pycache__", "runs", "data-bin", "raw")
        shutil.copytree(REPOSITORY / part, tmp_path / part, ignore=ignored)
    for file in ("pyproject.toml", "README.md", "CONTRIBUTING.md"):
        shutil.copy(REPOSITORY / file, tmp_path)
    text = GUIDE.read_text(encoding="utf-8")
    text = text[text.index("## A new norm") :]
    layer, settings, reference = re.findall(r"^```(?:python|yaml)\n(.*?)^```", text, re.M | re.S)[
        :3
    ]
    (tmp_path / "normexp/norms/mine.py").write_text(layer, encoding="utf-8")
    (tmp_path / "configs/norm/mine.yaml").write_text(settings, encoding="utf-8")
    (tmp_path / "normexp/norms/reference/mine.py").write_text(reference, encoding="utf-8")
    return tmp_path


@pytest.mark.thorough
def test_the_norm_of_the_guide_passes_the_tests(project: Path) -> None:
    ours = "mine or known_norms or design"  # the latter two list the norms that there are
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short"]
    done = subprocess.run(
        [*command, "-m", "not thorough", "-k", ours, *TESTS],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 30
