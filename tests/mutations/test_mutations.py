"""The faults of check_mutations.py stay current."""

import ast

import pytest
from check_mutations import FAULTS, REPOSITORY
from fault import Fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file}-{fault.what}")
def test_line_to_be_replaced_is_there(fault: Fault) -> None:
    source = (REPOSITORY / "normexp" / fault.file).read_text(encoding="utf-8")
    assert source.count(fault.old) == 1, "name a line that occurs once"
    broken = source.replace(fault.old, fault.new)
    assert broken != source
    if fault.file.endswith(".py"):  # no change of a comment
        assert ast.dump(ast.parse(broken)) != ast.dump(ast.parse(source))
    assert fault.tests
    for test in fault.tests:
        file, _, name = test.partition("::")
        path = REPOSITORY / "tests" / f"{file}.py"
        assert path.is_file(), test
        assert f"def {name}(" in path.read_text(encoding="utf-8") if name else True, test


def test_there_are_enough() -> None:
    assert len(FAULTS) >= 140
    packages = {fault.file.split("/")[0] for fault in FAULTS}
    assert packages >= {
        *("checkpoints", "config", "corpora", "evaluation", "fairseq_plugin"),
        *("norms", "report", "runs", "sweeps", "training"),
    }
