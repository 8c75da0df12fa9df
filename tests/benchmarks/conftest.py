"""Benchmarks choose kernels for the process, which tests restore; tiny models of the toy tasks."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from normexp.norms.kernels.choice import chosen_kernels, use_kernels

SMALL = [
    f"fairseq.model.{side}.{key}=16"
    for side in ("encoder", "decoder")
    for key in ("embed_dim", "ffn_embed_dim")
]


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    kernels, level = chosen_kernels(), logging.getLogger("fairseq").level
    yield
    use_kernels(kernels)
    logging.getLogger("fairseq").setLevel(level)


@pytest.fixture
def small_toy(tmp_path_factory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks prepare the corpus once, and their models are small."""
    from normexp.benchmarks.toy import toy_task  # here, because fairseq takes seconds

    folder = tmp_path_factory.getbasetemp() / "toy_corpora"

    def small(task: str, _: Path, *overrides: str):
        return toy_task(task, folder, *overrides, *SMALL)

    for module in ("bench_data", "bench_diagnostics", "bench_inference"):
        monkeypatch.setattr(f"normexp.benchmarks.{module}.toy_task", small)
