"""The block of results in the top-level README: paper and ours in the right cells, never stale."""

from pathlib import Path

import pytest

from normexp.errors import UserError
from normexp.report.aggregate import rows_by_task
from normexp.report.paper import load_paper
from normexp.report.readme import BEGIN, END, results_block
from normexp.report.report_files import check_files, report_files, write_files
from normexp.runs.records import load_records, record_path

RESULTS = Path(__file__).resolve().parents[2] / "results"
PAPER = load_paper(RESULTS / "paper.yaml")
SMALL = "two epochs"


@pytest.fixture
def runs(make_record):
    """Records of one label with the given test values by seed."""

    def make(task: str, label: str, metric: str, values: list[float], **changes):
        return [
            make_record(task=task, label=label, seed=seed, metrics={"test": {metric: v}}, **changes)
            for seed, v in enumerate(values, 1)
        ]

    return make


def grouped(*records):
    return rows_by_task({record_path(Path("results"), record): record for record in records})


def lines(block: str) -> dict[tuple[str, str], list[str]]:
    """The cells of every line, by the beginning of its table's title and its first cell."""
    cells_of, title = {}, ""
    for line in block.split("\n"):
        if line.startswith("| "):
            first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            title = title or first.split(":")[0].split(",")[0]
            cells_of[title, first] = cells
        else:
            title = ""
    return cells_of


def language_model(sees: bool, budget: str | None = None) -> dict:
    return {"kind": "language_model", "sees_future_tokens": sees, "budget": budget}


def test_without_records_every_cell_of_ours_says_not_run() -> None:
    shown = lines(results_block({}, PAPER, "results/README.md"))
    group_scaling = "PN with group scaling, as released"
    assert shown["Table 1", "LN"] == ["35.5", "not run", "29.5", "not run"]
    assert shown["Table 1", "PN, Algorithm 2"] == ["≈ 35.0", "not run", "—", "not run"]
    assert shown["Table 1", group_scaling] == ["35.9", "not run", "30.1", "not run"]
    two = ["not run", "not run"]
    assert shown["Table 2", "PN-V"] == ["55.3 †", *two, "21.3 †", *two]
    assert shown["Table 2", "PN, Algorithm 2"] == ["—", *two, "—", *two]
    assert shown["Table 2", group_scaling] == ["47.6 †", *two, "17.9 †", *two]


def test_runs_stand_in_the_column_of_their_experiment(runs, make_record) -> None:
    perplexity = "perplexity_per_word"
    tensorized = "table2_ptb_tensorized"
    rows = grouped(
        *runs("iwslt14", "PN", "bleu_tokenised", [35.0, 36.0]),
        *runs("iwslt14", "PN-released-mt", "bleu_tokenised", [35.5]),
        *runs("wmt14", "LN", "bleu_compound_split", [29.0]),
        *runs(tensorized, "PN-released-published", perplexity, [48.0], **language_model(True)),
        *runs(tensorized, "PN-causal", perplexity, [120.0], **language_model(False)),
        *runs("table2_ptb", "BN", perplexity, [110.0], **language_model(False)),
        *runs("wikitext103", "LN", perplexity, [25.0], **language_model(False)),
        make_record(task="iwslt14", label="BN", status="diverged", reason="NaN", metrics={}),
    )
    shown = lines(results_block(rows, PAPER, "results/README.md"))
    group_scaling = "PN with group scaling, as released"
    assert shown["Table 1", "PN, Algorithm 2"][:2] == ["≈ 35.0", "35.50 ± 0.71 (n = 2)"]
    assert shown["Table 1", group_scaling][:2] == ["35.9", "35.50 (n = 1)"]
    assert shown["Table 1", "LN"] == ["35.5", "not run", "29.5", "29.00 (n = 1)"]
    assert shown["Table 1", "BN"][:2] == ["34.4 †", "diverged"]
    assert shown["Table 2", group_scaling][:3] == ["47.6 †", "48.00 (n = 1)", "not run"]
    assert shown["Table 2", "PN, Algorithm 2"][:3] == ["—", "not run", "not run"]
    assert shown["Table 2", "BN"][:3] == ["60.7 †", "not run", "110.00 (n = 1)"]
    assert shown["Table 2", "LN"][5] == "25.00 (n = 1)"


def test_runs_with_other_settings_stand_for_no_norm_of_the_paper(runs) -> None:
    other = {"departures": ["norm.options.alpha_fwd=0.5 instead of 0.9"]}
    rows = grouped(*runs("iwslt14", "PN", "bleu_tokenised", [35.0], **other))
    shown = lines(results_block(rows, PAPER, "results/README.md"))
    assert shown["Table 1", "PN, Algorithm 2"][1] == "not run"


def test_small_models_stand_in_a_table_of_their_own(runs) -> None:
    perplexity = "perplexity_per_word"
    published, causal = language_model(True, SMALL), language_model(False, SMALL)
    rows = grouped(
        *runs("iwslt14", "LN", "bleu_tokenised", [11.0], budget=SMALL),
        *runs("multi30k", "LN", "bleu_tokenised", [37.5], budget=SMALL),
        *runs("ptb", "LN", perplexity, [158.0], **causal),
        *runs("ptb_future", "PN-published", perplexity, [144.0], **published),
        *runs("ptb_future", "PN-causal", perplexity, [197.5], **causal),
    )
    block = results_block(rows, PAPER, "results/README.md")
    shown = lines(block)
    assert shown["Table 1", "LN"][1] == "not run" and "11.00" not in block
    assert shown["small models", "LN"] == ["37.50 (n = 1)", "158.00 (n = 1)", "—", "—"]
    assert shown["small models", "PN, Algorithm 2"][2:] == ["197.50 (n = 1)", "144.00 (n = 1)"]
    assert ("small models", "BN") not in shown


def test_the_block_is_renewed_and_the_rest_of_the_readme_kept(runs, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    page = tmp_path / "results" / "README.md"
    rows = grouped(*runs("iwslt14", "LN", "bleu_tokenised", [35.25]))

    def files():
        return report_files(rows, PAPER, page, RESULTS, readme=readme)

    readme.write_text(f"# A\n\n{BEGIN}\n{END}\n\n## B\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"README\.md.*; run `python scripts/report\.py"):
        check_files(files())
    write_files(files())
    check_files(files())
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"# A\n\n{BEGIN}\n<!--") and text.endswith(f"{END}\n\n## B\n")
    assert "| LN | 35.5 | 35.25 (n = 1) |" in text
    assert "[results/README.md](results/README.md)" in text
    readme.write_text(text.replace("35.25 (n = 1)", "36.25 (n = 1)"), encoding="utf-8")
    with pytest.raises(UserError, match=rf"out of date: {readme}; run"):
        check_files(files())
    readme.write_text(text.replace("## B", "## C"), encoding="utf-8")
    check_files(files())


@pytest.mark.parametrize("text", ["no markers", BEGIN, END, f"{END} {BEGIN}"])
def test_a_readme_without_both_markers_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"README\.md: needs the lines <!-- results: begin -->"):
        report_files({}, PAPER, tmp_path / "page.md", RESULTS, readme=tmp_path / "README.md")


def test_the_block_of_the_committed_records_is_short() -> None:
    rows = rows_by_task(load_records(RESULTS))
    assert len(results_block(rows, PAPER, "results/README.md").splitlines()) <= 32
