"""The benchmark of the preparation, with a small corpus."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from normexp.benchmarks import bench_preparation as benchmark
from normexp.benchmarks import preparation_peers
from normexp.benchmarks.wmt_like import pairs
from normexp.corpora.catalogue import load_catalogue
from normexp.report.benchmark_tables import tables

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"


def test_record(tmp_path, monkeypatch) -> None:
    recipe = load_catalogue()["wmt14"].model_copy(update={"bpe_merges": 100})
    monkeypatch.setattr(benchmark, "load_catalogue", lambda: {"wmt14": recipe})
    record = tmp_path / "results" / "record.json"
    result = benchmark.measure_stages(1200, 5, tmp_path / "work", record, progress=False)
    assert json.loads(record.read_text(encoding="utf-8")) == result
    text = tmp_path / "work" / "text"
    kept = (text / "tokenized" / "train.de").read_bytes().count(b"\n")
    assert result["pairs_after_the_filter"] == kept < 1200
    types = set()
    for language in ("en", "de"):
        types.update((text / "tokenized" / f"train.{language}").read_text("utf-8").split())
    assert result["word_types_joint"] == len(types)
    assert set(result["stages"]) == {
        "unpack", "normalize, tokenize, clean", "learn BPE", "apply BPE", "binarize",
    }  # fmt: skip
    total = sum(stage["seconds"] for stage in result["stages"].values())
    assert result["total_seconds"] == pytest.approx(total)
    assert result["real_corpus"]["pairs"] == 4_590_101
    hours = total * 4_590_101 / 1200 / 3600
    assert result["real_corpus"]["hours_at_most"] == pytest.approx(hours, abs=0.01)
    assert result["peak_memory_bytes"] > 50e6  # of a Python with PyTorch
    assert set(result["lines_per_second_of_one_process"]) == {
        "normalize_punctuation", "remove_non_printing", "tokenize_aggressive",
    }  # fmt: skip
    assert {"learn BPE", "apply BPE"} <= {row["what"] for row in result["peers"]}
    assert tables("preparation", result)[-1][0] == "Steps beside other software"


def test_memory_of_children_counts() -> None:
    before = benchmark._memory_of_tree()
    program = "import sys; x = b'1' * 300_000_000; print('ready', flush=True); sys.stdin.read()"
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    child.stdout.readline()
    grown = benchmark._memory_of_tree() - before
    child.communicate()
    # Less than the child's: what this process frees meanwhile, and the pages of
    # libraries that are shared with more processes than before.
    assert 280e6 <= grown < 350e6


def test_help_and_errors() -> None:
    shown = _run("--help")
    assert shown.returncode == 0 and "--pairs" in shown.stdout
    shown = _run("--pairs", "3")
    assert shown.returncode == 2 and "at least 1000" in shown.stderr
    shown = _run("--pairs", str(10**15))
    assert shown.returncode == 1 and shown.stderr.startswith("error: 2500000000.0 GB are needed")


def _run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, "preparation", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_peers_give_what_ours_do() -> None:
    """On lines for whose tokens the scripts' version does not matter."""
    scripts = preparation_peers.moses_scripts()
    if isinstance(scripts, str):
        pytest.skip(scripts)
    for language, column in (("en", 0), ("de", 1)):
        lines = [pair[column].rstrip(".:'") + " x" for pair in pairs(6, 300)]
        ours = preparation_peers.tokenized(lines, language)
        theirs = preparation_peers.by_scripts(scripts, lines, language)
        assert [line.split() for line in ours] == [line.split() for line in theirs]


def test_what_is_not_installed_is_named(monkeypatch) -> None:
    monkeypatch.setattr(preparation_peers.shutil, "which", lambda name: None)
    measured, skipped = preparation_peers.compare(
        {"en": ["a b c abc", "abc"]}, "#version: 0.2\na b\n", 1
    )
    assert list(skipped) == ["Moses' Perl scripts"]
    assert [row["what"] for row in measured] == ["learn BPE", "apply BPE"]
