"""The packages of normexp depend on each other in one direction, and names mean one thing each."""

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "normexp"

# What lies in normexp/, lowest layer first. A part may import the parts of lower layers only, not
# those beside it. `norms` is for other people's models, so it imports nothing of the rest.
LAYERS = (
    ("errors", "files", "paths", "norms"),
    ("sites",),
    ("corpora", "fairseq_plugin"),
    ("config", "checkpoints"),
    ("runs",),
    ("training", "evaluation", "report", "sweeps"),
    ("tracking", "benchmarks"),
    ("pipeline",),
)
HEIGHT = {part: height for height, layer in enumerate(LAYERS) for part in layer}

# A file of one of these folders is named for the layer that it computes: the layer itself, its
# reference, its kernels. Nowhere else do two files have one name.
OF_LAYERS = {"norms", "norms/reference", "norms/kernels/triton"}
OF_PYTHON = {"__init__", "__main__"}

# scripts/train.py, asked for a run that is complete, has imported these.
WITHOUT_TORCH = (
    "normexp.config.identity",
    "normexp.runs.archive",
    "normexp.runs.folder",
    "normexp.runs.records",
    "normexp.sweeps.run_status",
    "normexp.sweeps.slurm",
    "normexp.sweeps.sweep",
    "normexp.training.process_group",
)


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path, when_imported_only: bool = False) -> Iterator[str]:
    """Modules of this package that a file imports, also inside functions unless asked otherwise."""
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: an import relative to the package"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in FILES else str(node.module) for name in names]
        else:
            names = []
        yield from (name for name in names if name in FILES)
        if not (when_imported_only and isinstance(node, ast.FunctionDef | ast.Lambda)):
            todo.extend(ast.iter_child_nodes(node))


def part(module: str) -> str:
    """The package or module directly in normexp/ that a module belongs to."""
    return module.split(".")[1] if "." in module else ""


def test_every_part_has_a_layer() -> None:
    assert {part(module) for module in FILES} - {""} == HEIGHT.keys()


def test_dependencies_point_to_lower_layers() -> None:
    against = {
        f"{FILES[module].relative_to(PACKAGE)} -> {part(target)}"
        for module in FILES
        for target in imported(FILES[module])
        if part(module) != part(target) and HEIGHT[part(target)] >= HEIGHT[part(module)]
    }
    assert not against


def test_norms_import_nothing_of_the_rest() -> None:
    norms = [path for module, path in FILES.items() if part(module) == "norms"]
    assert {part(target) for path in norms for target in imported(path)} == {"norms"}


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Importing a.b imports a first; within a that is no circle, for a is under way already."""
    needs = {}
    for module, path in FILES.items():
        direct = set(imported(path, when_imported_only=True))
        parents = {name[:end] for name in direct for end, c in enumerate(name) if c == "."}
        needs[module] = direct | {
            name for name in parents if not f"{module}.".startswith(f"{name}.")
        }
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_few_modules_lie_beside_the_packages() -> None:
    assert len([path for path in PACKAGE.glob("*.py") if path.stem != "__init__"]) <= 5


def test_a_name_means_one_thing() -> None:
    folders = defaultdict(set)
    for path in FILES.values():
        folders[path.stem].add(str(path.relative_to(PACKAGE).parent))
    several = {name for name, found in folders.items() if len(found) > 1 and not found <= OF_LAYERS}
    assert several <= OF_PYTHON


def test_what_a_complete_run_needs_does_not_import_torch() -> None:
    code = (
        f"import sys, {', '.join(WITHOUT_TORCH)}; print({{'torch', 'fairseq'}} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "set()\n"
