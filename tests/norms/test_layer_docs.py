"""Each layer's docstring ends with its reference, its proof and its number, and they are right."""

import inspect
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from normexp.norms import available_norms, norm_class
from normexp.norms.reference import REFERENCES

ROOT = Path(__file__).parents[2]
RECORDED = re.compile(r"results/README\.md: (?P<tasks>[\w, ]+) \((?P<label>[\w-]+)\)")
UNRECORDED = "no training run of it is recorded"

# Runs in a process of its own: collects with each of the commands and prints what they select.
COLLECT = """
import json, sys
import pytest

class Collector:
    def pytest_collection_finish(self, session):
        self.ids = [item.nodeid for item in session.items]

found = {}
for name, arguments in json.load(sys.stdin).items():
    collector = Collector()
    pytest.main(["--collect-only", "-p", "no:cacheprovider", *arguments], plugins=[collector])
    found[name] = collector.ids
print(json.dumps(found))
"""


def line(name: str, what: str) -> str:
    """Content of the line `what: ...` among the last three of the layer's docstring."""
    last = inspect.getdoc(norm_class(name)).split("\n")[-3:]
    assert [text.partition(": ")[0] for text in last] == ["Reference", "Proof", "Number"], name
    return dict(text.split(": ", 1) for text in last)[what]


@pytest.fixture(scope="module")
def selected() -> dict[str, list[str]]:
    """Ids of the tests that each layer's proof selects."""
    commands = {name: shlex.split(line(name, "Proof")) for name in available_norms()}
    assert {command[0] for command in commands.values()} == {"pytest"}
    done = subprocess.run(
        [sys.executable, "-c", COLLECT],
        input=json.dumps({name: command[1:] for name, command in commands.items()}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.strip().split("\n")[-1])


@pytest.mark.parametrize("name", available_norms())
def test_reference_is_the_layers(name: str) -> None:
    path = line(name, "Reference")
    assert (ROOT / path).is_file()
    assert REFERENCES[name].__module__ == path.removesuffix(".py").replace("/", ".")
    assert norm_class(name).__module__ == f"normexp.norms.{name}"


@pytest.mark.parametrize("name", available_norms())
def test_proof_selects_the_layers_tests(name: str, selected: dict[str, list[str]]) -> None:
    """The comparison with the reference is among them, and no test of another layer is."""
    ids = selected[name]
    assert any("::test_layer_equals_reference[" in one for one in ids)
    for one in ids:
        assert re.search(rf"\b{name}\]$", one), one


@pytest.mark.parametrize("name", available_norms())
def test_number_has_its_records(name: str) -> None:
    number = line(name, "Number")
    if number == UNRECORDED:
        return
    where = RECORDED.fullmatch(number)
    assert where, number
    for task in where["tasks"].split(", "):
        path = ROOT / "results" / "records" / task / f"{where['label']}-seed1.json"
        assert json.loads(path.read_text(encoding="utf-8"))["norm"] == name
        assert path.name in (ROOT / "results" / "README.md").read_text(encoding="utf-8")
