"""The list of faults in check_mutations.py stays current."""

import ast

import pytest
from check_mutations import FAULTS, NORMS, Fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file}-{fault.what}")
def test_line_to_be_replaced_is_there(fault: Fault) -> None:
    source = (NORMS / fault.file).read_text(encoding="utf-8")
    assert source.count(fault.old) == 1, "name a line that occurs once"
    assert ast.dump(ast.parse(source.replace(fault.old, fault.new))) != ast.dump(ast.parse(source))
    for test in fault.tests:
        assert (NORMS.parents[1] / "tests" / "norms" / f"{test}.py").is_file(), test


def test_there_are_enough() -> None:
    assert len(FAULTS) >= 20
    assert len({fault.file for fault in FAULTS}) >= 10
