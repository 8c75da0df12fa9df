"""What `make` installs for which command, and that it says how much it needs before it does."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
ONLY_FOR_TESTS = ("triton", "transformers", "selenium", "pytest", "hypothesis", "ruff")


def commands(target: str, venv: Path) -> str:
    """What make would do for a target where nothing is installed yet."""
    done = subprocess.run(
        ["make", "-n", target, f"VENV={venv}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_the_demo_installs_nothing_that_only_tests_need(tmp_path: Path) -> None:
    shown = commands("demo", tmp_path / "venv")
    assert "scripts/demo.py" in shown and shown.count("scripts/install.sh") == 1
    assert "install.sh dev" not in shown
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    base, tests = project["dependencies"], project["optional-dependencies"]["dev"]
    for name in ONLY_FOR_TESTS:
        assert not any(entry.startswith(name) for entry in base)
        assert any(entry.startswith(name) for entry in tests)


@pytest.mark.parametrize("target", ["test", "test-all", "fast", "test-norms"])
def test_tests_get_what_they_need_and_say_why_they_skip(target: str, tmp_path: Path) -> None:
    shown = commands(target, tmp_path / "venv")
    steps = "scripts/install.sh\n", "scripts/install.sh dev", "-m pytest"
    places = [shown.index(step) for step in steps]
    assert places == sorted(places)
    assert " -rs" in shown


@pytest.mark.parametrize(("extra", "needed"), [([], "1300 MB"), (["dev"], "1400 MB")])
def test_a_disk_that_is_too_small_is_noticed_first(extra, needed, tmp_path: Path) -> None:
    df = tmp_path / "df"
    df.write_text("#!/bin/sh\necho header\necho /dev/disk 99999 90000 700 99% /\n")
    df.chmod(0o755)
    done = subprocess.run(
        ["bash", str(REPOSITORY / "scripts" / "install.sh"), *extra],
        env={
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            **{"PYTHON": sys.executable, "VENV": str(tmp_path / "venv"), "TORCH": "0"},
            **{"FAIRSEQ": "fairseq-fixed", "CACHE": str(tmp_path)},
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and not (tmp_path / "venv").exists()
    assert f"about {needed} on this disk (free: 700 MB)" in done.stdout
    assert f"needs about {needed} in " in done.stderr
