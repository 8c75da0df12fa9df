"""Documents: links, commands, numbers and versions that they name exist and agree."""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from normexp.norms import available_norms, norm_class

REPOSITORY = Path(__file__).resolve().parents[2]
README = REPOSITORY / "README.md"
PAGES = [
    README,
    REPOSITORY / "CONTRIBUTING.md",
    REPOSITORY / "CHANGELOG.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(REPOSITORY)) for page in pages]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for _, link in LINK.findall(page.read_text("utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if link.startswith(("http:", "https:")):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_commands_name_existing_files(page: Path) -> None:
    """Scripts, and files and folders of tests."""
    named = set(re.findall(r"\b(?:scripts/\w+\.\w+|tests/[\w/]+\.py)", page.read_text("utf-8")))
    assert not sorted(path for path in named if not (REPOSITORY / path).is_file())


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_make_targets_exist(page: Path) -> None:
    makefile = (REPOSITORY / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([\w%-]+):", makefile, re.M))
    named = set(re.findall(r"`make ([\w-]+)", page.read_text("utf-8")))
    assert not {
        name for name in named - targets if not (name[:5] == "test-" and "test-%" in targets)
    }


def test_readme_is_short() -> None:
    assert len(README.read_text("utf-8").splitlines()) <= 150


def test_every_norm_is_in_the_table_with_its_files() -> None:
    text = README.read_text("utf-8")
    rows = {
        name: row
        for row in re.findall(r"^\| `.*$", text[text.index("## All norms") :], re.M)
        for name in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    configs = {path.stem for path in (REPOSITORY / "configs" / "norm").glob("*.yaml")}
    assert set(rows) == configs >= set(available_norms())
    for name in available_norms():
        for path in (f"normexp/norms/{name}.py", f"normexp/norms/reference/{name}.py"):
            assert f"({path})" in rows[name], f"{name} without {path}"


def test_code_that_the_readme_points_at() -> None:
    method = re.search(r"`PowerNorm\.(\w+)`", README.read_text("utf-8"))[1]
    assert callable(getattr(norm_class("power"), method))


def test_example_of_the_readme_runs() -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), re.M | re.S)
    scope: dict[str, Any] = {}
    exec(compile(code, str(README), "exec"), scope)
    assert scope["y"].shape == scope["x"].shape


def numbers_of(value: Any, key: str = "") -> Iterator[float]:
    """What a record or a benchmark measured: perplexities, BLEU, ratios of times."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from numbers_of(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from numbers_of(inner, key)
    elif isinstance(value, float) and re.match("perplexity|bleu|ratio", key):
        yield value


@pytest.mark.parametrize("page", [README], ids=names([README]))
def test_linked_numbers_are_in_their_records(page: Path) -> None:
    """[164.0](results/records/ptb/PN-seed1.json): rounded like this, the record holds it."""
    checked, wrong = 0, []
    for text, link in LINK.findall(page.read_text("utf-8")):
        if not (link.endswith(".json") and re.fullmatch(r"[\d,]+(\.\d+)?", text)):
            continue
        digits = len(text.partition(".")[2])
        record = json.loads((page.parent / link).read_text("utf-8"))
        shown = {f"{number:.{digits}f}" for number in numbers_of(record)}
        checked += 1
        if text.replace(",", "") not in shown:
            wrong.append(f"{text}: {link}")
    assert not wrong
    assert checked > 15


def requirements(text: list[str]) -> dict[str, Requirement]:
    return {(found := Requirement(line)).name: found for line in text}


def project() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]


def test_python_of_the_environment_is_the_projects() -> None:
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text("utf-8"))
    (python,) = [line for line in environment["dependencies"] if line.startswith("python=")]
    version = python.partition("=")[2]
    assert Requirement(f"python{project()['requires-python']}").specifier.contains(version)


def test_pinned_torch_fits_the_requirement() -> None:
    torch = re.search(r"^TORCH := (.*)$", (REPOSITORY / "Makefile").read_text("utf-8"), re.M)[1]
    assert requirements(project()["dependencies"])["torch"].specifier.contains(torch)


def test_ruff_is_the_same_everywhere() -> None:
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text("utf-8"))
    (repository,) = hooks["repos"]
    ruff = requirements(project()["optional-dependencies"]["dev"])["ruff"]
    assert ruff.specifier.contains(repository["rev"].removeprefix("v"))


def test_hydra_refuses_dangerous_targets() -> None:
    """Releases before 1.3.4 call whatever a configuration names as `_target_`."""
    hydra = requirements(project()["dependencies"])["hydra-core"]
    assert not [old for old in ("1.3.2", "1.3.3") if hydra.specifier.contains(old)]


def test_citation_names_the_software_and_the_paper() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text("utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["version"] == project()["version"]
    assert citation["license"] == project()["license"]["text"]
    assert citation["authors"] and citation["message"]
    (paper,) = citation["references"]
    assert (paper["type"], paper["year"]) == ("conference-paper", 2020)
    assert paper["authors"][0]["family-names"] == "Shen"
