"""Benchmarks choose kernels for the process; tests leave them as they were."""

from collections.abc import Iterator

import pytest

from normexp.norms.kernels.choice import chosen_kernels, use_kernels


@pytest.fixture(autouse=True)
def kernels_as_before() -> Iterator[None]:
    before = chosen_kernels()
    yield
    use_kernels(before)
