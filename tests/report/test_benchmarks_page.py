"""The page of the benchmarks shows the values of the records; a stale page is found."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from normexp.errors import UserError
from normexp.report.benchmark_tables import authors_table, load_benchmarks
from normexp.report.figures import digest_of, norms_svg, scaling_svg
from normexp.report.paper import Paper
from normexp.report.report_files import check_files, report_files, write_files

NO_PAPER = Paper(tasks={}, values=[], differences=[])
SOURCE = {
    "hardware": {"processor": "Some CPU", "num_cores": 4, "num_threads": 3, "gpus": []},
    "versions": {"python": "3.11.7", "torch": "2.13.0", "fairseq-fixed": "0.12.3.1"},
    "malloc": {"MALLOC_TOP_PAD_": "7"},
    "code_commit": "0123456789abcdef",
    "code_dirty": True,
    "measured_at": "2026-01-02T03:04:05+00:00",
}


def _norm(layer: str, dtype: str, ratio: list[float], ms: float, **more: Any) -> dict[str, Any]:
    plain = {"shape": "(4, 5, 6)", "disturbed": False}
    own = {"layer": layer, "dtype": dtype, "ratio_to_layer_norm": ratio, "milliseconds": ms}
    return plain | own | more


def _size(sweep: str, size: int, layer: str, ratio: list[float]) -> dict[str, Any]:
    row = {"sweep": sweep, "tokens": 4096, "channels": 512, "groups": None, sweep: size}
    times = {"nanoseconds_per_element": [0.5, 0.625, 0.75], "ratio_to_layer_norm": ratio}
    return row | times | {"dtype": "float32", "layer": layer, "disturbed": False}


RECORDS: dict[str, dict[str, Any]] = {
    "norms": {
        "what": "layers",
        "measured": [
            _norm("nn.LayerNorm", "float32", [1, 1, 1], 2.5),
            _norm("power", "float32", [0.71, 0.75, 0.815], 1.875),
            _norm("nn.LayerNorm", "bfloat16", [1, 1, 1], 3.5),
            _norm("power", "bfloat16", [0.35, 0.375, 0.4], 1.3125, disturbed=True),
        ],
    },
    "scaling": {
        "what": "sizes",
        "measured": [
            *(_size("tokens", n, "nn.LayerNorm", [1, 1, 1]) for n in (256, 1024)),
            _size("tokens", 256, "power", [1.5, 2.0, 2.5]),
            _size("tokens", 1024, "power", [0.5, 1.0, 1.5]),
            _size("groups", 1, "power_released, 1 groups", [2.0, 2.25, 2.5]),
            _size("groups", 4, "power_released, 4 groups", [3.0, 3.25, 3.5]),
        ],
    },
    "training": {
        "what": "updates",
        "measured": [
            {
                "configuration": "all, compiled",
                "milliseconds": 331.25,
                "speedup_over_stock": [3.0, 3.125, 3.25],
                "tokens_per_second": 9057,
                "loss": 7.25,
                "disturbed": False,
            }
        ],
        "profiles": {"fairseq": [{"share": 0.2008, "ms": 214.0, "what": "aten::bernoulli_"}]},
    },
    "inference": {
        "what": "models",
        "encoder": [
            _norm("", "float32", [0.965, 0.972, 0.98], 107.8, batch="32 x 40", norm="PN, folded")
        ],
        "beam_search": [
            {
                "search": "ours",
                "beam": 5,
                "sentences": 500,
                "different_hypotheses": 0,
                "sentences_per_second": 128.25,
                "ratio_to_fairseq": [0.8, 0.875, 0.9],
                "disturbed": False,
            }
        ],
    },
    "data": {
        "what": "batches",
        "measured": [
            {
                "task": "toy_translation",
                "part": "reading",
                "milliseconds_per_batch": [0.5, 0.75, 1.0],
                "batches_per_second": 1333.3,
                "tokens_per_second": 1428000,
                "ratio_to_step": [0.006, 0.0076, 0.0087],
                "disturbed": False,
            }
        ],
    },
    "diagnostics": {
        "what": "updates",
        "measured": [
            {
                "norm": "power",
                "values": 60,
                "milliseconds_per_update": [190.0, 200.0, 225.0],
                "milliseconds_of_diagnostics": [1.25, 1.5, 1.75],
                "ratio_with_to_without": [0.98, 1.01, 1.03],
                "share_of_logged_update": [0.006, 0.0075, 0.009],
                "log_interval": 50,
                "share_of_training": [0.00012, 0.00015, 0.00018],
                "disturbed": False,
            }
        ],
    },
}
LINES = [
    "| nn.LayerNorm | 1.00 · 2.5 ms |",
    "| power | 0.75 (0.71–0.81) · 1.88 ms |",
    "| power | 0.38 (0.35–0.40) · 1.31 ms ≈ |",
    "| layer | 256 | 1024 |",
    "| power | 2.00 (1.50–2.50) · 0.625 ns | 1.00 (0.50–1.50) · 0.625 ns |",
    r"| power\_released, 4 groups | 3.25 (3.00–3.50) · 0.625 ns |",
    "| all, compiled | 331.2 | 3.12 (3.00–3.25) | 9,057 | 7.2500 |",
    r"| aten::bernoulli\_ | 20.1 % | 214.0 |",
    "| PN, folded | 0.97 (0.96–0.98) · 108 ms |",
    "| ours | 5 | 500 | 0 | 128.2 | 0.88 (0.80–0.90) |",
    r"| toy\_translation | reading | 0.75 (0.50–1.00) | 1,333.3 | 1,428,000 | 0.0076 "
    "(0.0060–0.0087) |",
    "| power | 60 | 200.00 (190.00–225.00) | 1.50 (1.25–1.75) | 1.01 (0.98–1.03) | 0.75 % "
    "| 0.015 % (every 50 updates) |",
]
AUTHORS = """
what: a layer
source: their code
machine: a Xeon
measured:
- {software: theirs, malloc: default, layer_norm: [2.0, 2.5], power: [47.0], batch: [16, 18]}
"""


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder of results with a record of every kind that is made up here."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for name, record in RECORDS.items():
        command = {"command": f"python scripts/benchmark.py {name} --rounds 3"}
        (folder / f"{name}.json").write_text(json.dumps(SOURCE | command | record), "utf-8")
    (folder / "authors.yaml").write_text(AUTHORS, "utf-8")
    return tmp_path


def _files(results: Path) -> dict[Path, str]:
    return report_files(
        {}, NO_PAPER, results / "README.md", results, benchmarks=load_benchmarks(results)
    )


def test_the_numbers_are_those_of_the_records(results: Path) -> None:
    files = _files(results)
    text = files[results / "benchmarks" / "README.md"]
    lines = text.splitlines()
    for line in LINES:
        assert line in lines
    for name in RECORDS:
        command = f"```sh\npython scripts/benchmark.py {name} --rounds 3\n```\n"
        after = text.split(command)[1].lstrip()
        assert after.startswith(
            "Some CPU, 4 cores; 3 threads; malloc MALLOC\\_TOP\\_PAD\\_=7; Python 3.11.7, "
            "torch 2.13.0, fairseq-fixed 0.12.3.1; commit 0123456 with changes; 2026-01-02; "
            f"[record]({name}.json)"
        )
    assert text.count("≈ other processes ran meanwhile") == 1
    assert "(benchmarks/README.md)" in files[results / "README.md"]
    assert "(../figures/benchmark_norms.svg)" in text
    assert results / "figures" / "benchmark_scaling.svg" in files


def test_the_authors_times_are_quoted_with_their_source_and_as_multiples(results: Path) -> None:
    text = _files(results)[results / "benchmarks" / "README.md"]
    assert "| theirs | default | 2–2.5 | 47 | 16–18 | 18.8–23.5 | 6.4–9.0 |" in text
    assert "their code, on a Xeon. That is another machine than ours" in text
    header = authors_table(load_benchmarks(results).authors).header
    assert header[-2:] == ["power / LN", "batch / LN"]


def test_what_was_not_measured_is_absent(results: Path) -> None:
    for name in ("norms", "scaling", "training", "data", "diagnostics"):
        (results / "benchmarks" / f"{name}.json").unlink()
    files = _files(results)
    headings = re.findall("^## (.*)$", files[results / "benchmarks" / "README.md"], re.MULTILINE)
    assert headings == ["Inference"]
    assert not [path for path in files if path.suffix == ".svg"]
    (results / "benchmarks" / "inference.json").unlink()
    files = _files(results)
    assert "benchmarks" not in "".join([*map(str, files), *files.values()]).replace(
        str(results), ""
    )


def test_a_stale_page_or_figure_is_found(results: Path) -> None:
    write_files(_files(results))
    check_files(_files(results))
    path = results / "benchmarks" / "norms.json"
    record = json.loads(path.read_text("utf-8"))
    record["measured"][1]["ratio_to_layer_norm"] = [0.6, 0.7, 0.8]
    path.write_text(json.dumps(record), "utf-8")
    stale = r"out of date: .*benchmarks/README\.md, .*benchmark_norms\.svg; run"
    with pytest.raises(UserError, match=stale):
        check_files(_files(results))
    path.unlink()
    with pytest.raises(UserError, match="out of date"):
        check_files(_files(results))
    write_files(_files(results))
    with pytest.raises(UserError, match=r"made from no record: .*benchmark_norms\.svg"):
        check_files(_files(results))


@pytest.mark.parametrize("name", list(RECORDS))
def test_a_record_that_lacks_something_is_named(results: Path, name: str) -> None:
    path = results / "benchmarks" / f"{name}.json"
    record = json.loads(path.read_text("utf-8"))
    for key in set(record) & {"measured", "beam_search"}:
        broken = copy.deepcopy(record)
        del broken[key][0][next(iter(broken[key][0]))]
        path.write_text(json.dumps(broken), "utf-8")
        with pytest.raises(UserError, match=rf"{name}\.json: '\w+' is missing; measure again"):
            load_benchmarks(results)


def test_strange_files_are_refused(results: Path) -> None:
    path = results / "benchmarks" / "speeds.json"
    path.write_text("{}", "utf-8")
    with pytest.raises(UserError, match=r"speeds\.json: no such benchmark; known: norms"):
        load_benchmarks(results)
    path.unlink()
    (results / "benchmarks" / "norms.json").write_text("[1]", "utf-8")
    with pytest.raises(UserError, match=r"norms\.json: not a record"):
        load_benchmarks(results)


def test_figures_follow_every_ratio_and_show_every_layer() -> None:
    rows = copy.deepcopy(RECORDS["norms"]["measured"])
    first = norms_svg(rows)
    assert digest_of(first) == digest_of(norms_svg(rows))
    for text in ("power", "nn.LayerNorm", "float32", "bfloat16", "(4, 5, 6)"):
        assert f">{text}</text>" in first
    rows[3]["ratio_to_layer_norm"][2] = 0.41
    assert digest_of(first) != digest_of(norms_svg(rows))
    rows = copy.deepcopy(RECORDS["scaling"]["measured"])
    first = scaling_svg(rows)
    assert ">power</text>" in first and ">tokens</text>" in first and ">groups</text>" in first
    rows[5]["groups"] = 8
    assert digest_of(first) != digest_of(scaling_svg(rows))


GOALS = """
- what: PN / LN
  before: "2.1"
  goal: 0.75
  record: norms
  where: {layer: power, shape: "(4, 5, 6)", dtype: float32}
  value: ratio_to_layer_norm
  floor: calls
- {what: an update, before: "1", goal: 0.3, record: training,
   where: {configuration: "all, compiled"}, value: speedup_over_stock, inverse: true}
- {what: installing, before: 4.4 min, goal: null, now: 2 min, floor: ""}
"""


def test_goals_stand_beside_what_the_records_say(results: Path) -> None:
    (results / "benchmarks" / "goals.yaml").write_text(GOALS, "utf-8")
    lines = _files(results)[results / "benchmarks" / "README.md"].splitlines()
    assert "| PN / LN | 2.1 | [0.75](norms.json) | ≤ 0.75 ✓ | calls |" in lines
    assert "| an update | 1 | [0.32](training.json) | ≤ 0.3 |  |" in lines
    assert "| installing | 4.4 min | 2 min |  |  |" in lines


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("layer: power,", "layer: powder,", "PN / LN: 0 rows of norms.json"),
        ("value: ratio_to_layer_norm", "value: ratio", "PN / LN: 1 rows of norms.json"),
        ("record: training", "record: trainings", "an update: 0 rows of trainings.json"),
    ],
)
def test_a_goal_without_its_number_is_an_error(
    results: Path, before: str, after: str, message: str
) -> None:
    (results / "benchmarks" / "goals.yaml").write_text(GOALS.replace(before, after), "utf-8")
    with pytest.raises(UserError, match=re.escape(message)):
        _files(results)


def test_a_misspelt_goal_is_an_error(results: Path) -> None:
    path = results / "benchmarks" / "goals.yaml"
    path.write_text(GOALS.replace("before:", "befor:"), "utf-8")
    with pytest.raises(UserError, match=r"goals\.yaml"):
        load_benchmarks(results)


def test_a_record_under_another_condition_has_a_heading_of_its_own(results: Path) -> None:
    folder = results / "benchmarks"
    (folder / "norms-tuned.json").write_text((folder / "norms.json").read_text("utf-8"), "utf-8")
    text = _files(results)[folder / "README.md"]
    headings = re.findall("^## (.*)$", text, re.MULTILINE)
    assert headings[:2] == ["Normalization layers", "Normalization layers, tuned"]
