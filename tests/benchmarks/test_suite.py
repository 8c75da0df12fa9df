"""The benchmarks and their options, as scripts/benchmark.py offers them."""

import importlib
import inspect
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from normexp.benchmarks.suite import BENCHMARKS
from normexp.report.benchmark_tables import TITLES, environment

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"


def test_every_benchmark_has_a_module_and_a_page() -> None:
    assert set(BENCHMARKS) == set(TITLES)
    for name, benchmark in BENCHMARKS.items():
        measure = importlib.import_module(f"normexp.benchmarks.bench_{name}").measure
        options = {*benchmark.options, *benchmark.paths, *benchmark.flags}
        assert set(inspect.signature(measure).parameters) == {*options, "record", "progress"}


def test_help_loads_no_torch() -> None:
    program = (
        "import runpy, sys; sys.argv = ['benchmark.py', '--help']\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert shown.stdout.endswith("False\n"), shown.stderr


@pytest.mark.parametrize("option", ["--rounds", "--threads"])
def test_impossible_numbers_are_refused(option: str) -> None:
    command = [sys.executable, SCRIPT, "norms", option, "0"]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 2 and f"{option}: at least" in shown.stderr


def test_threads_reach_the_record_and_the_table_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from normexp.benchmarks import bench_norms
    from normexp.benchmarks.peers import Peers

    monkeypatch.setattr(bench_norms, "SHAPES", {"small": (4, 6, 8)})
    monkeypatch.setattr(bench_norms, "compiled_peers", lambda *_: Peers({}, {}))
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1000")
    record = tmp_path / "norms.json"
    arguments = ["norms", "--rounds", "2", "--threads", "2", "--output", str(record)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    content = json.loads(record.read_text(encoding="utf-8"))
    assert content["hardware"]["num_threads"] == 2
    assert content["command"].endswith("norms --rounds 2 --threads 2")
    printed = capsys.readouterr().out
    assert "power_released" in printed and str(record) in printed
    line = environment(content)
    assert "2 threads" in line and "malloc MALLOC_TOP_PAD_=1000" in line


def test_the_other_grammar_is_refused() -> None:
    shown = subprocess.run(
        [sys.executable, SCRIPT, "norms", "rounds=3"], capture_output=True, text=True
    )
    assert shown.returncode == 2 and "write --rounds 3" in shown.stderr


def test_all_runs_every_benchmark_and_says_what_was_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """One record each in the folder, with fewer rounds; one that fails does not end the others."""
    started: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        started.append([str(word) for word in command])
        return subprocess.CompletedProcess(command, int(command[2] == "data"))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "all", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == 1
    assert [command[2] for command in started] == [name for name in BENCHMARKS if name != "gpu"]
    for _, script, name, *options in started:
        assert script == str(SCRIPT) and options[-2:] == [
            "--output",
            str(tmp_path / f"{name}.json"),
        ]
        for option, value in zip(options[:-2:2], options[1:-2:2], strict=True):
            assert BENCHMARKS[name].options[option.removeprefix("--")].parse(value) > 0
    printed = capsys.readouterr().out
    assert "gpu: skipped: there is no GPU" in printed and "data: FAILED with status 1" in printed
    assert "norms: 0 s" in printed


def test_all_leaves_committed_records_alone() -> None:
    folder = SCRIPT.parents[1] / "results" / "benchmarks"
    shown = subprocess.run(
        [sys.executable, SCRIPT, "all", "--output", str(folder)], capture_output=True, text=True
    )
    assert shown.returncode == 1 and "has the committed records" in shown.stderr
