"""Layers with more than one implementation pass the same tests with each."""

from collections.abc import Iterator

import pytest

from normexp.norms.kernels import native
from normexp.norms.kernels.choice import chosen_kernels, use_kernels

EVERYTHING_TWICE = {
    "test_broken_batches",
    "test_golden",
    "test_invariances",
    "test_known_layers",
    "test_padding",
    "test_precision",
    "test_references",
    "test_runaway_nu",
    "test_state",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__ in EVERYTHING_TWICE:
        metafunc.parametrize("kernels", ["native", "plain"], indirect=True)


@pytest.fixture(autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which implementation the test is about; elsewhere what a user would get."""
    before, wanted = chosen_kernels(), getattr(request, "param", "auto")
    if wanted == "native" and not native.load(native.NATIVE_SOURCES / "power.cpp"):
        pytest.skip("no compiled kernels here: see the line that kernels.native has logged")
    use_kernels(wanted)
    yield wanted
    use_kernels(before)
