"""Tables against hand calculation, and nothing in them that could mislead."""

import csv
import io
import json
import os
import random
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from normexp.errors import UserError
from normexp.report.aggregate import Difference, Row, Sample, differences, rows_by_task
from normexp.report.console import print_results
from normexp.report.html import report_html
from normexp.report.paper import Paper, load_paper
from normexp.report.report_files import check_files, report_files, write_files
from normexp.report.result_tables import differences_table, results_table, runs_table
from normexp.runs.records import Record, load_records, record_path, write_record

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "scripts" / "report.py"

PAPER = """
tasks:
  iwslt14: {title: German-English, setting: small}
  ptb: {title: Penn Treebank, setting: no mask, also: [table2_ptb]}
values:
- {task: iwslt14, norm: LN, compare_with: [LN], metric: bleu_tokenised, value: 35.5,
   verified: true, source: abstract}
- {task: iwslt14, norm: BN, compare_with: [BN], metric: bleu_tokenised, value: 34.4,
   verified: false, source: memory}
- {task: iwslt14, norm: PN, compare_with: [PN, PN-released], metric: bleu_tokenised, value: 35.9,
   verified: true, source: README}
- {task: ptb, norm: PN, compare_with: [PN], metric: perplexity_per_word, value: 47.6,
   verified: false, sees_future_tokens: true, source: memory}
differences:
- {task: iwslt14, norm: PN, minus: LN, compare_with: [PN], metric: bleu_tokenised, value: 0.4,
   verified: true, source: abstract}
- {task: ptb, norm: PN, minus: LN, compare_with: [PN, PN-published],
   metric: perplexity_per_word, value: -5.6,
   verified: true, sees_future_tokens: true, source: abstract}
"""


@pytest.fixture
def paper(tmp_path) -> Paper:
    path = tmp_path / "paper.yaml"
    path.write_text(PAPER, encoding="utf-8")
    return load_paper(path)


@pytest.fixture
def runs(make_record):
    """Records with the given test values: runs("PN", {1: 35.0}, task="ptb", ...)."""

    def make(label: str, values: dict[int, float | None], metric="bleu_tokenised", **changes):
        return [
            make_record(label=label, seed=seed, metrics={"test": {metric: value}}, **changes)
            for seed, value in values.items()
        ]

    return make


def grouped(*records: Record) -> dict[str, list[Row]]:
    return rows_by_task({record_path(Path("results"), record): record for record in records})


def lm(**changes):
    defaults = {"task": "ptb", "kind": "language_model", "metric": "perplexity_per_word"}
    return defaults | {"sees_future_tokens": True} | changes


def line(table, first: str) -> dict[str, str]:
    """The row whose first cell is `first`, as a dict by heading."""
    [found] = [row for row in table.rows if row[0] == first]
    return dict(zip(table.header, found, strict=True))


def notes(table) -> str:
    return "\n".join(note.text for note in table.notes)


values = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30)


@settings(deadline=None)
@given(values)
def test_mean_and_standard_deviation_by_hand(xs):
    sample = Sample(dict(enumerate(xs)))
    exact = [Fraction(x) for x in xs]
    mean = sum(exact) / len(exact)
    variance = sum((x - mean) ** 2 for x in exact) / (len(exact) - 1)
    assert sample.mean == pytest.approx(float(mean), rel=1e-12, abs=1e-9)
    assert sample.sd == pytest.approx(float(variance) ** 0.5, rel=1e-9, abs=1e-9)


# 97.5 % quantiles of Student's t, from printed tables, by degrees of freedom.
STUDENT_T = {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262, 20: 2.086, 29: 2.045, 120: 1.980}


@pytest.mark.parametrize("degrees", STUDENT_T)
def test_the_interval_is_that_of_students_t(degrees):
    xs = np.random.default_rng(degrees).normal(30, 2, degrees + 1)
    low, high = Sample(dict(enumerate(xs.tolist()))).interval
    half = STUDENT_T[degrees] * np.std(xs, ddof=1) / np.sqrt(len(xs))
    assert (low + high) / 2 == pytest.approx(np.mean(xs))
    assert (high - low) / 2 == pytest.approx(half, rel=5e-4)


def test_one_seed_has_no_spread():
    sample = Sample({4: 35.0})
    assert (sample.n, sample.mean, sample.sd, sample.interval) == (1, 35.0, None, None)


def test_a_row_shows_ours_the_papers_and_the_difference(runs, paper):
    rows = grouped(*runs("PN", {1: 35.0, 2: 36.0, 3: 35.8}), *runs("LN", {1: 35.1}))["iwslt14"]
    table = results_table("iwslt14", rows, paper)
    pn = line(table, "PN")
    # mean 35.6, deviations -0.6 0.4 0.2, variance 0.56 / 2
    assert pn["test BLEU (tokenised)"] == "35.60 ± 0.53 (n = 3)"
    assert (pn["published"], pn["ours − published"]) == ("35.9", "−0.3")
    assert pn["runs"] == "3 of 3 complete"
    ln = line(table, "LN")
    assert ln["test BLEU (tokenised)"] == "35.10 (n = 1)"
    assert (ln["published"], ln["ours − published"]) == ("35.5", "−0.4")


def test_norms_come_in_the_papers_order(runs, paper):
    labels = ["PN-released", "Zebra", "PN", "AdaNorm", "BN", "LN", "PN-V"]
    rows = grouped(*(run for label in labels for run in runs(label, {1: 1.0})))["iwslt14"]
    shown = [row[0] for row in results_table("iwslt14", rows, paper).rows]
    assert shown == ["LN", "BN", "PN-V", "PN", "PN-released", "AdaNorm", "Zebra"]


def test_a_norm_that_only_the_paper_has_is_shown_without_a_run(runs, paper):
    table = results_table("iwslt14", grouped(*runs("PN-released", {1: 35.0}))["iwslt14"], paper)
    assert [row[0] for row in table.rows] == ["LN", "BN", "PN-released"]
    bn = line(table, "BN")
    assert (bn["test BLEU (tokenised)"], bn["published"], bn["runs"]) == ("—", "34.4 †", "no runs")
    assert bn["ours − published"] == ""
    assert "† published number, not verified" in notes(table)


def test_a_small_budget_is_marked_and_never_compared_with_the_paper(runs, paper):
    budget = "2 epochs on 2 CPU cores; not the paper's setting"
    rows = grouped(*runs("PN", {1: 35.0}, budget=budget), *runs("LN", {1: 34.0}))["iwslt14"]
    table = results_table("iwslt14", rows, paper)
    pn = line(table, "PN ‡")
    assert (pn["published"], pn["ours − published"]) == ("not comparable", "")
    assert f"‡ PN: {budget}." in notes(table)
    assert line(table, "LN")["ours − published"] == "−1.5"
    assert differences(rows) == []  # nor with a run of the full budget


@pytest.mark.parametrize(
    ("sees", "name", "paper_cell", "difference"),
    [(True, "PN §", "47.6 †", "+2.4"), (False, "PN", "not comparable", "")],
)
def test_only_a_model_that_sees_the_future_is_compared_with_the_published_ones(
    runs, paper, sees, name, paper_cell, difference
):
    records = [
        *runs("PN", {1: 50.0}, **lm(sees_future_tokens=sees)),
        *runs("LN", {1: 55.0}, **lm(sees_future_tokens=sees)),
    ]
    rows = grouped(*records)["ptb"]
    table = results_table("ptb", rows, paper)
    pn = line(table, name)
    assert (pn["published"], pn["ours − published"]) == (paper_cell, difference)
    assert ("sees the tokens it predicts" in notes(table)) == sees
    [compared] = differences_table("ptb", rows, paper).rows
    assert compared[-1] == ("−5.6" if sees else "not comparable")


def test_tasks_that_share_the_papers_numbers(runs, paper):
    rows = grouped(*runs("PN", {1: 50.0}, **lm(task="table2_ptb")))["table2_ptb"]
    assert line(results_table("table2_ptb", rows, paper), "PN §")["ours − published"] == "+2.4"


def test_runs_of_different_configuration_or_corpus_are_not_averaged(runs, paper):
    other_corpus = {"name": "iwslt14", "hashes": {"test.en": "11" * 32}, "counts": {}}
    rows = grouped(
        *runs("PN", {1: 30.0, 2: 32.0}, config_hash="a" * 12),
        *runs("PN", {3: 40.0}, config_hash="b" * 12),
        *runs("PN", {4: 50.0}, config_hash="b" * 12, corpus=other_corpus),
        *runs("LN", {1: 1.0}),
    )["iwslt14"]
    table = results_table("iwslt14", rows, paper)
    shown = {row[0]: row[1] for row in table.rows if row[0].startswith("PN")}
    assert sorted(shown.values()) == ["31.00 ± 1.41 (n = 2)", "40.00 (n = 1)", "50.00 (n = 1)"]
    names = list(shown)
    assert len(set(names)) == 3 and "[aaaaaaaa" in names[0] and "[bbbbbbbb" in names[1]
    assert f"{', '.join(names)} differ in configuration, corpus or budget" in notes(table)
    assert "LN" in [row[0] for row in table.rows]  # the only one of its label: no hash


def test_diverged_and_failed_runs_are_reported_and_not_averaged(make_record, runs, paper):
    rows = grouped(
        *runs("PN", {1: 35.0}),
        make_record(
            seed=2,
            status="diverged",
            reason="loss is\nNaN",
            diverged_at_update=1234,
            metrics={"test": {"bleu_tokenised": 1.0}},
        ),
        make_record(seed=3, status="failed", reason="out of memory", metrics={}),
        make_record(label="BN", status="diverged", reason="x", diverged_at_update=5, metrics={}),
    )["iwslt14"]
    table = results_table("iwslt14", rows, paper)
    pn, bn = line(table, "PN"), line(table, "BN")
    assert pn["test BLEU (tokenised)"] == "35.00 (n = 1)"
    assert pn["runs"] == "1 of 3 complete"
    assert [link.text for link in pn["records"]] == ["seed 1", "seed 2", "seed 3"]
    assert bn["test BLEU (tokenised)"] == "diverged"
    assert "PN, seed 2: diverged at update 1,234: loss is NaN; not in the mean." in notes(table)
    assert "PN, seed 3: failed: out of memory; not in the mean." in notes(table)
    statuses = [row[2] for row in runs_table(rows).rows]
    assert statuses[1:3] == ["complete", "diverged at update 1,234: loss is NaN"]


def test_a_value_that_is_not_finite_is_reported(runs, paper):
    rows = grouped(*runs("PN", {1: 30.0, 2: None}, **lm()))["ptb"]
    table = results_table("ptb", rows, paper)
    assert line(table, "PN §")["test PPL per word"] == "30.00 (n = 1)"
    assert "PN, seed 2: test PPL per word is not a finite number; not in the mean." in notes(table)


def test_different_signatures_are_shown_separately(make_record, paper):
    def signed(label, signature):
        metrics = {"test": {"sacrebleu": 30.0, "sacrebleu_signature": signature}}
        return make_record(label=label, metrics=metrics)

    one = grouped(signed("LN", "nrefs:1"), signed("PN", "nrefs:1"))["iwslt14"]
    assert "sacreBLEU signature: nrefs:1" in notes(results_table("iwslt14", one, paper))
    two = grouped(signed("LN", "nrefs:1"), signed("PN", "nrefs:2"))["iwslt14"]
    shown = notes(results_table("iwslt14", two, paper))
    assert "signature of LN: nrefs:1" in shown and "signature of PN: nrefs:2" in shown


def test_differences_are_paired_by_seed(runs, paper):
    rows = grouped(
        *runs("LN", {1: 30.0, 2: 31.0, 3: 35.0, 9: 99.0}),
        *runs("PN", {1: 30.5, 2: 31.25, 3: 35.75, 4: 0.0}),
    )["iwslt14"]
    [compared] = differences_table("iwslt14", rows, paper).rows
    # 0.50 0.25 0.75: mean 0.5, standard deviation 0.25, t(2) = 4.303, 4.303 * 0.25 / 3**0.5 = 0.62
    assert compared == [
        "PN − LN",
        "test BLEU (tokenised)",
        "+0.50 ± 0.25 (n = 3)",
        "−0.12 to +1.12",
        "no difference shown",
        "+0.4",
    ]


@pytest.mark.parametrize(
    ("metric", "theirs", "verdict"),
    [
        ("bleu_tokenised", {1: 1.0, 2: 1.1, 3: 0.9}, "PN is better"),
        ("bleu_tokenised", {1: -1.0, 2: -1.1, 3: -0.9}, "LN is better"),
        ("perplexity_per_word", {1: 1.0, 2: 1.1, 3: 0.9}, "LN is better"),
        ("perplexity_per_word", {1: -1.0, 2: -1.1, 3: -0.9}, "PN is better"),
        ("perplexity_per_word", {1: -1.0, 2: 1.1, 3: 0.9}, "no difference shown"),
        ("bleu_tokenised", {1: 1.0, 2: 1.0}, "not judged: fewer than 3 seeds"),
    ],
)
def test_the_verdict_follows_the_rule(runs, metric, theirs, verdict):
    [row], [baseline] = (grouped(*runs(label, {1: 1.0}))["iwslt14"] for label in ("PN", "LN"))
    assert Difference(row, baseline, metric, Sample(theirs)).verdict == verdict


def test_without_a_shared_seed_there_is_no_difference(runs):
    assert differences(grouped(*runs("LN", {1: 1.0}), *runs("PN", {2: 1.0}))["iwslt14"]) == []


def test_runs_are_listed_with_their_cost_and_origin(make_record):
    gpu = {"gpus": ["NVIDIA H200", "NVIDIA H200"], "processor": "x", "num_cores": 16}
    rows = grouped(
        make_record(
            seed=2, hardware=gpu, code_dirty=True, wall_time_seconds=42.4, peak_memory_of="run"
        ),
        make_record(seed=10, tokens_per_second=None, peak_memory_bytes=None),
        make_record(seed=11),  # made before a run's own peak was measured
    )["iwslt14"]
    table = runs_table(rows)
    second, tenth, older = (dict(zip(table.header, row, strict=True)) for row in table.rows)
    assert (second["seed"], tenth["seed"]) == ("2", "10")
    assert second["hardware"] == "2 × NVIDIA H200" and tenth["hardware"] == "Some CPU, 2 cores"
    assert second["commit"] == "0123456 (modified)" and tenth["commit"] == "0123456"
    assert second["wall time"] == "42 s" and tenth["wall time"] == "2 h 03 min"
    assert second["peak memory"] == "3.00 GiB" and tenth["peak memory"] == ""
    assert older["peak memory"] == "≤ 3.00 GiB"
    assert second["tokens/s"] == "12,346" and second["updates"] == "60,000"


@pytest.fixture
def results(tmp_path, make_record, runs):
    """A results folder with several tasks, norms and seeds and everything that needs a mark."""
    folder = tmp_path / "results"
    records = [
        *runs("LN", {1: 35.0, 2: 35.25, 3: 35.5}),
        *runs("PN", {1: 35.75, 2: 36.125, 3: 36.25}),
        make_record(label="BN", status="diverged", reason="a | b_c*d", diverged_at_update=7),
        *runs("PN", {1: 50.0}, **lm(budget="100% of <nothing> & {$5} #1_2^3~")),
        *runs("LN", {1: 60.0}, **lm(task="toy_language_model", sees_future_tokens=False)),
    ]
    for record in records:
        write_record(record_path(folder, record), record)
    return folder


def files_of(folder: Path, paper: Paper, page: Path) -> dict[Path, str]:
    return report_files(rows_by_task(load_records(folder)), paper, page, home=folder)


def test_every_link_of_the_page_leads_to_a_file_and_every_record_is_linked(results, paper):
    (results / "PROTOCOL.md").touch()
    page = results / "README.md"
    write_files(files_of(results, paper, page))
    targets = re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    linked = {(page.parent / target).resolve() for target in targets}
    assert all(path.is_file() for path in linked)
    assert linked >= set(results.rglob("records/**/*.json"))


def test_every_line_of_a_table_has_as_many_cells(results, paper):
    page = results / "README.md"
    text = files_of(results, paper, page)[page]
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) > 5
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in table.strip().split("\n")}
        assert len(widths) == 1
    assert r"a \| b\_c\*d" in text


def test_the_same_records_give_the_same_bytes_anywhere(results, paper, tmp_path):
    first = files_of(results, paper, results / "README.md")
    moved = tmp_path / "elsewhere" / "results"
    shuffled = [path for path in results.rglob("*") if path.is_file()]
    random.Random(0).shuffle(shuffled)
    for path in shuffled:
        target = moved / path.relative_to(results)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    second = files_of(moved, paper, moved / "README.md")
    assert [(path.relative_to(results), text) for path, text in first.items()] == [
        (path.relative_to(moved), text) for path, text in second.items()
    ]


def test_a_report_that_does_not_match_its_records_is_refused(results, paper):
    page = results / "README.md"
    with pytest.raises(UserError, match=r"out of date: .*README\.md"):
        check_files(files_of(results, paper, page))
    write_files(files_of(results, paper, page))
    check_files(files_of(results, paper, page))
    path = results / "records" / "iwslt14" / "PN-seed1.json"
    path.write_text(path.read_text("utf-8").replace("35.75", "35.76"), encoding="utf-8")
    with pytest.raises(UserError, match=r"out of date: .*README\.md"):
        check_files(files_of(results, paper, page))
    write_files(files_of(results, paper, page))
    (results / "tables" / "gone.csv").touch()
    with pytest.raises(UserError, match=r"made from no record: .*gone\.csv"):
        check_files(files_of(results, paper, page))


def test_a_baseline_with_a_suffix_is_compared_with_its_like(runs, paper):
    """LN-published is the baseline of PN-published, and both stand for what the paper has."""
    published = lm(task="table2_ptb", budget=None)
    causal = published | {"sees_future_tokens": False}
    rows = grouped(
        *runs("LN-published", {1: 55.0}, **published),
        *runs("PN-published", {1: 50.0}, **published),
        *runs("LN-causal", {1: 125.0}, **causal),
        *runs("PN-causal", {1: 123.0}, **causal),
    )["table2_ptb"]
    found = {(d.row.label, d.baseline.label): d.sample.mean for d in differences(rows)}
    assert found == {("PN-published", "LN-published"): -5.0, ("PN-causal", "LN-causal"): -2.0}
    table = differences_table("table2_ptb", rows, paper)
    cells = {row[0].split(" ")[0]: row[-1] for row in table.rows}
    assert cells["PN-published"].startswith("−5.6")
    assert cells["PN-causal"] == ""


def test_what_the_published_numbers_mean_stands_above_their_table(tmp_path):
    path = tmp_path / "paper.yaml"
    path.write_text(PAPER.replace("setting: no mask", "setting: no mask, meaning: No *model*."))
    page = tmp_path / "README.md"
    text = report_files({}, load_paper(path), page, tmp_path)[page]
    section = text[text.index("## ptb") :]
    assert section.index("Setting of the paper") < section.index("No \\*model\\*.\n")
    assert section.index("No \\*model") < section.index("| norm |")


def test_latex_is_well_formed(results, paper):
    files = files_of(results, paper, results / "README.md")
    sources = [text for path, text in files.items() if path.suffix == ".tex"]
    assert len(sources) == 3
    for source in sources:
        assert source.isascii()
        bare = re.sub(r"\\[{}%$&#_]", "", source)
        assert bare.count("{") == bare.count("}")
        assert bare.count("$") % 2 == 0
        assert re.findall(r"\\begin\{(\w+)\}", bare) == ["table", "tabular"]
        assert re.findall(r"\\end\{(\w+)\}", bare) == ["tabular", "table"]
        [columns] = re.findall(r"\\begin\{tabular\}\{([lr]+)\}", bare)
        rows = [row for row in bare.split("\n") if row.endswith(r" \\")]
        assert {row.count("&") + 1 for row in rows} == {len(columns)}
        outside_math = re.sub(r"\$[^$]*\$", "", bare)
        for special in "#^~":
            assert special not in re.sub(r"\\text\w+\{\}", "", outside_math)
        assert "%" not in bare.split("\n", 1)[1]


def test_csv_has_full_precision(results, paper):
    files = files_of(results, paper, results / "README.md")
    by_name = {path.name: list(csv.DictReader(io.StringIO(text))) for path, text in files.items()}
    [pn] = [row for row in by_name["iwslt14.csv"] if row["label"] == "PN"]
    assert float(pn["mean"]) == pytest.approx((35.75 + 36.125 + 36.25) / 3, rel=1e-15)
    assert float(pn["ours_minus_paper"]) == pytest.approx(float(pn["mean"]) - 35.9)
    assert (pn["n"], pn["seeds"], pn["num_incomplete"]) == ("3", "1 2 3", "0")
    for row in by_name["runs.csv"]:
        record = json.loads((results / row["record"]).read_text("utf-8"))
        assert row["label"] == record["label"] and row["status"] == record["status"]
        if row["split"]:
            assert float(row["value"]) == record["metrics"][row["split"]][row["metric"]]
    assert len({row["record"] for row in by_name["runs.csv"]}) == 9


def test_the_console_shows_names_as_they_are(runs, paper):
    text = io.StringIO()
    rows = grouped(
        *runs("PN", {1: 35.0}, config_hash="a" * 12),
        *runs("PN", {2: 36.0}, config_hash="b" * 12),
    )
    print_results(rows, paper, Console(file=text, width=200))
    assert re.search(r"PN \[aaaaaaaa\] +35\.00 \(n = 1\)", text.getvalue())


def report(*arguments: str | Path, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_the_script_writes_checks_and_prints(results, tmp_path):
    printed = report("--results", results, "--console-only", cwd=tmp_path)
    assert printed.returncode == 0 and "36.04 ± 0.26 (n = 3)" in printed.stdout
    assert not (results / "README.md").exists()
    assert report("--results", results).returncode == 0
    assert {path.name for path in (results / "tables").iterdir()} >= {"runs.csv", "ptb.tex"}
    assert report("--results", results, "--check").returncode == 0
    os.remove(results / "tables" / "ptb.tex")
    stale = report("--results", results, "--check")
    assert stale.returncode == 1 and "out of date" in stale.stderr


def test_the_script_reports_an_error_in_one_line(results, tmp_path):
    missing = report("--results", tmp_path / "nowhere")
    (results / "records" / "ptb" / "PN-seed1.json").write_text("{", encoding="utf-8")
    corrupt = report("--results", results)
    for done, cause in [(missing, "no folder"), (corrupt, "PN-seed1.json: not JSON")]:
        assert done.returncode == 1
        assert cause in done.stderr and done.stderr.count("\n") == 1


def test_without_records_there_is_still_a_page(tmp_path):
    (tmp_path / "empty").mkdir()
    done = report("--results", tmp_path / "empty")
    assert done.returncode == 0 and "no records" in done.stdout
    page = (tmp_path / "empty" / "README.md").read_text(encoding="utf-8")
    assert "| PN | — | ≈ 35.0 |" in page and "| PN-released | — | 35.9 |" in page


def test_reporting_needs_neither_torch_nor_fairseq_nor_wandb():
    script = (
        "import runpy, sys; sys.argv = ['report.py', '--console-only']\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "sys.exit(bool({'torch', 'fairseq', 'wandb', 'hydra'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        ("value: 35.5", "valeu: 35.5", "values.0.value: Field required"),
        ("value: 35.5", "value: high", "values.0.value"),
        ("tasks:", "tasks: [", "not YAML"),
    ],
)
def test_a_bad_file_of_published_numbers_is_named_with_its_fault(tmp_path, old, new, cause):
    path = tmp_path / "paper.yaml"
    path.write_text(PAPER.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_paper(path)
    assert str(path) in str(error.value) and cause in str(error.value)


def test_the_published_numbers_agree_with_each_other():
    paper = load_paper(REPOSITORY / "results" / "paper.yaml")
    assert len(paper.differences) == 4
    for entry in paper.differences:
        ours = paper.value(entry.task, entry.norm, entry.metric)
        theirs = paper.value(entry.task, entry.minus, entry.metric)
        assert ours.value - theirs.value == pytest.approx(entry.value)
    for entry in paper.values:
        assert entry.task in paper.tasks
        assert entry.verified != ("from memory" in entry.source)


def test_the_layer_of_algorithm_2_stands_only_beside_numbers_of_that_layer():
    """The paper's numbers are of the layer with group scaling (the author, issues #8 and #9)."""
    paper = load_paper(REPOSITORY / "results" / "paper.yaml")
    algorithm_2 = {"PN", "PN-published", "PN-causal", "PN-bounded"}
    [beside] = [
        entry
        for entry in [*paper.values, *paper.differences]
        if algorithm_2.intersection(entry.compare_with)
    ]
    assert (beside.task, beside.value, beside.approximate) == ("iwslt14", 35.0, True)
    assert "without group scaling" in beside.layer
    for entry in [*paper.values, *paper.differences]:
        if entry.norm.startswith("PN-released"):
            assert "with group scaling" in entry.layer or "the same" in entry.layer
            assert all(label.startswith("PN-released") for label in entry.compare_with)
        assert entry.layer or not entry.norm.startswith("PN")


def test_the_layer_of_a_published_number_is_named_wherever_it_is_shown(runs, tmp_path):
    path = tmp_path / "paper.yaml"
    layer = "value: 35.9, layer: with % groups, approximate: true, sd: 0.25"
    path.write_text(PAPER.replace("value: 35.9", layer), encoding="utf-8")
    paper = load_paper(path)
    rows = {"iwslt14": grouped(*runs("PN", {1: 35.0}))["iwslt14"]}
    assert (
        line(results_table("iwslt14", rows["iwslt14"], paper), "PN")["published"]
        == "≈ 35.90 ± 0.25"
    )
    files = report_files(rows, paper, tmp_path / "README.md", tmp_path)
    name = "PN ≈ 35.90 ± 0.25: with % groups"
    assert name in files[tmp_path / "README.md"]
    assert name.replace("%", "\\%").replace("±", "$\\pm$") in (
        files[tmp_path / "tables" / "iwslt14.tex"].replace(r"$\approx$", "≈")
    )
    [pn] = csv.DictReader(io.StringIO(files[tmp_path / "tables" / "iwslt14.csv"]))
    assert (pn["paper"], pn["paper_layer"]) == ("35.9", "with % groups")
    page = report_html(rows, paper, {}, [], "2026-01-02T03:04:05+00:00")
    assert f"{name}.</li>" in page


def test_the_published_tables_are_up_to_date_with_the_records():
    checked = report("--check")
    assert checked.returncode == 0, checked.stderr
