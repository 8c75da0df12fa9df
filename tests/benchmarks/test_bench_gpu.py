"""The benchmark of a GPU runs from one end to the other, and no part of it costs another one.

Without a GPU it rehearses: the same code with tiny sizes, in triton's interpreter.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from normexp.benchmarks import bench_gpu
from normexp.benchmarks.gpu import section
from normexp.benchmarks.gpu.section import Section
from normexp.errors import UserError
from normexp.norms.kernels.choice import use_kernels
from normexp.report.benchmark_tables import tables

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@needs_triton
@pytest.mark.thorough  # two minutes
def test_rehearsal(tmp_path: Path) -> None:
    record = tmp_path / "gpu.json"
    shown = subprocess.run(
        [sys.executable, SCRIPT, "gpu", "--rehearsal", "--output", record],
        capture_output=True,
        text=True,
        timeout=590,
    )
    assert shown.returncode == 0, shown.stderr[-4000:]
    content = json.loads(record.read_text(encoding="utf-8"))
    assert content["rehearsal"] and "gpu --rehearsal --threads" in content["command"]
    sections = content["sections"]
    assert set(sections) == set(bench_gpu.SECTIONS)
    # fairseq's float16 needs CUDA; the peers are compiled for GPUs.
    expected = {"Liger", "quack", "fairseq, float16"}
    for name, one in sections.items():
        assert one["error"] == "" and one["rows"], f"{name}: {one['error']}"
        assert set(one["skipped"]) <= expected, name
    kernels = sections["kernels"]["rows"]
    assert len(kernels) == 2 * 6 and all(row["passed"] for row in kernels)
    assert all(row["equal_to_the_bit"] for row in sections["graphs"]["rows"])
    timed = {row["layer"] for row in sections["layers"]["rows"]}
    assert {"nn.LayerNorm", "power", "power_released", "power, plain torch"} < timed
    assert {"power, torch.compile", "batch, torch.compile"} < {
        row["layer"] for row in sections["compiled"]["rows"]
    }
    updates = sections["translation"]["rows"]
    assert {row["model"] for row in updates} == {"IWSLT14 small", "WMT14 big"}
    assert {"fairseq, float32", "PN, bfloat16"} < {row["configuration"] for row in updates}
    for row in sections["language_model"]["rows"]:
        seconds = row["milliseconds"][1] / 1e3
        assert row["hours"] == pytest.approx(20_000 * seconds / 3600, abs=1e-3)
    assert {row["model"] for row in sections["beam_search"]["rows"]} == {"LN", "PN", "PN, folded"}
    printed = " ".join(shown.stdout.split())
    for title, table in tables("gpu", content):
        assert table.rows and title.split(":")[0] in printed


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="there is no GPU that torch can use; --rehearsal"):
        bench_gpu.measure(False, tmp_path / "gpu.json", progress=False)


# --- Sections that fail, in processes of their own


def two_rows(rehearsal: bool) -> Iterator[section.Row]:
    yield {"bytes": 1, "bytes_per_second": 2.0}
    yield {"skipped": "a peer", "reason": "it is not there"}
    yield {"bytes": 3, "bytes_per_second": float(rehearsal)}


def one_row_then_an_error(rehearsal: bool) -> Iterator[section.Row]:
    yield {"bytes": 1, "bytes_per_second": 2.0}
    raise ValueError("wrong\nin detail")


def one_row_then_the_end_of_the_process(rehearsal: bool) -> Iterator[section.Row]:
    yield {"bytes": 1, "bytes_per_second": 2.0}
    os._exit(3)


def one_row_then_nothing_for_long(rehearsal: bool) -> Iterator[section.Row]:
    yield {"bytes": 1, "bytes_per_second": 2.0}
    time.sleep(3600)


def test_a_section_that_fails_keeps_its_rows_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = f"{__name__}:"
    functions = {
        "kernels": one_row_then_an_error,
        "layers": one_row_then_the_end_of_the_process,
        "graphs": one_row_then_nothing_for_long,
        "copy": two_rows,
    }
    sections = {
        name: Section(name, here + function.__name__, 30) for name, function in functions.items()
    }
    sections["graphs"] = Section("graphs", here + one_row_then_nothing_for_long.__name__, 8)
    sections["translation"] = Section("translation", here + "two_rows", 30, ("no_such_package",))
    monkeypatch.setattr(bench_gpu, "SECTIONS", sections)
    monkeypatch.setattr(section, "_PATIENCE", 1)
    saved: list[int] = []

    def save(path: Path, content: dict) -> None:
        saved.append(sum(len(one["rows"]) for one in content["sections"].values()))

    monkeypatch.setattr(bench_gpu, "write_json", save)
    result = bench_gpu.measure(True, tmp_path / "gpu.json", progress=False)["sections"]
    assert {name: len(one["rows"]) for name, one in result.items()} == {
        "kernels": 1, "layers": 1, "graphs": 1, "copy": 2, "translation": 0
    }  # fmt: skip
    assert result["kernels"]["error"] == "ValueError: wrong"
    assert result["layers"]["error"] == "its process ended with 3"
    assert result["graphs"]["error"] == "ended after 8 s"
    assert result["translation"]["error"] == "not run: no_such_package is not installed"
    assert result["copy"]["error"] == "" and result["copy"]["rows"][1]["bytes_per_second"] == 1.0
    assert result["copy"]["skipped"] == {"a peer": "it is not there"}
    assert saved == sorted(saved) and {1, 2, 3, 4, 5} <= set(saved)  # as they came
    for broken in ("kernels", "layers", "graphs"):
        result[broken]["rows"] = []
    shown = dict(tables("gpu", {"sections": result}))
    assert [note.text for note in shown["kernels"].notes] == ["Not complete: ValueError: wrong"]
    assert [note.text for note in shown["copy"].notes] == ["Skipped: a peer: it is not there."]


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain layer, with a gradient that is off by a thousandth, in the kernel's place."""
    from normexp.benchmarks.gpu import kernels

    original = kernels._step

    def wrong(norm, x, gradient, padding_mask, which):
        found = original(norm, x, gradient, padding_mask, "plain")
        if which == "triton":
            found["dL/dx"] = found["dL/dx"] * 1.001
        return found

    monkeypatch.setattr(kernels, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(kernels, "_step", wrong)
    for case in kernels.CASES:
        row = kernels.check(case, "float32", rehearsal=True)
        assert not row["passed"] and row["repeats"] and not row["failure"]
        assert row["errors"]["dL/dx"] == pytest.approx(1e-3, rel=0.05)
        assert max(error for name, error in row["errors"].items() if name != "dL/dx") < 1e-5


def test_a_kernel_that_did_not_run_is_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a layer would compute in plain torch after all, nothing has been shown."""
    from normexp.benchmarks.gpu import kernels

    monkeypatch.setattr(kernels, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(kernels, "use_kernels", lambda choice: use_kernels("plain"))
    row = kernels.check("power", "float32", rehearsal=True)
    assert not row["passed"]
    assert row["failure"] == "RuntimeError: plain kernels computed, not triton"
    ((_, table),) = tables("gpu", _record_of("kernels", [row]))
    assert table.rows[0][-1] == f"NO {row['failure']}"


def test_what_a_section_has_started_ends_with_it(tmp_path: Path) -> None:
    """A section that takes too long is compiling, by processes of the compiler's."""
    left = tmp_path / "process"
    os.environ["NORMEXP_TEST_FILE"] = str(left)
    try:
        running = section.run(Section("", f"{__name__}:with_a_process_of_its_own", 6), False)
        with pytest.raises(TimeoutError):
            list(running)
    finally:
        del os.environ["NORMEXP_TEST_FILE"]
    status = Path("/proc") / left.read_text() / "stat"
    for _ in range(100):
        if not status.exists() or status.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("it goes on")


def with_a_process_of_its_own(rehearsal: bool) -> Iterator[section.Row]:
    started = subprocess.Popen(["sleep", "3600"])
    Path(os.environ["NORMEXP_TEST_FILE"]).write_text(str(started.pid))
    time.sleep(3600)
    yield {}


def _record_of(name: str, rows: list[section.Row]) -> dict:
    return {"sections": {name: {"title": name, "rows": rows, "skipped": {}, "error": ""}}}
