"""pyproject.toml declares what the code imports, and nothing else."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Distributions that are not named like what they install.
DISTRIBUTIONS = {
    "fairseq": "fairseq-fixed",
    "fairseq_cli": "fairseq-fixed",
    "hydra": "hydra-core",
    "hydra_plugins": "hydra-submitit-launcher",
    "yaml": "pyyaml",
}
OURS = {"normexp", "support"}  # the latter in tests/
BUILD = REPOSITORY / "scripts" / "build_fairseq"  # runs where fairseq is built, before all else
FAIRSEQ = "fairseq-fixed"  # installed by `make install`; pyproject.toml says why
FOR_FAIRSEQ = {"bitarray", "cffi", "packaging", "scikit-learn"}
# Imported where they are there; each belongs to an extra.
OPTIONAL = {"ctranslate2", "pyarrow", "sentencepiece", "triton", "wandb-workspaces"}


def test_every_import_of_the_project_is_declared() -> None:
    assert imported("normexp", "scripts") - {FAIRSEQ} - OPTIONAL <= declared()
    assert declared("benchmarks", "corpora", "dashboard", "dev") >= OPTIONAL


def test_what_builds_fairseq_imports_the_build_system_alone() -> None:
    assert {name for file in BUILD.rglob("*.py") for name in imports(file)} == {"setuptools"}


def test_every_dependency_is_imported_by_the_project_or_by_fairseq() -> None:
    assert declared() - imported("normexp", "scripts") == FOR_FAIRSEQ
    assert {distribution(name) for name in requires(FAIRSEQ)} >= FOR_FAIRSEQ


def test_every_import_of_the_tests_is_declared() -> None:
    assert imported("tests") - {FAIRSEQ} <= declared() | declared("dev")


def declared(*extras: str) -> set[str]:
    """Distributions among the dependencies, or of the extras."""
    optional = PROJECT["optional-dependencies"]
    lists = [optional[extra] for extra in extras] or [PROJECT["dependencies"]]
    return {distribution(entry) for entries in lists for entry in entries}


def distribution(requirement: str) -> str:
    """Normalized name of the distribution that a requirement names."""
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def imported(*folders: str) -> set[str]:
    """Distributions that the Python files below these folders import anywhere."""
    files = [path for folder in folders for path in (REPOSITORY / folder).rglob("*.py")]
    assert len(files) > 5
    files = [path for path in files if not path.is_relative_to(BUILD)]
    packages = {name for file in files for name in imports(file)}
    return {DISTRIBUTIONS.get(name, name.lower().replace("_", "-")) for name in packages}


def imports(file: Path) -> Iterator[str]:
    """Top-level packages of others that a file imports."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for name in names:
            package = name.partition(".")[0]
            ours = package in OURS or file.with_name(f"{package}.py").exists()
            if not ours and package not in sys.stdlib_module_names:
                yield package
