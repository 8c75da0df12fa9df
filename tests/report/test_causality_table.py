"""Causality records survive writing and reading and make a table beside their runs."""

import dataclasses
import json
from pathlib import Path

import pytest

from normexp.errors import UserError
from normexp.report.aggregate import rows_by_task
from normexp.report.paper import Paper
from normexp.report.report_files import report_files
from normexp.runs.causality_record import (
    CausalityRecord,
    load_causality_records,
    write_causality_record,
)
from normexp.runs.records import record_path

CAUSALITY = CausalityRecord(
    task="ptb",
    label="LN-published",
    seed=1,
    config_hash="aaaaaaaaaaaa",
    checkpoint="best",
    split="test",
    blocks=32,
    draw_seed=0,
    sees_future_tokens=True,
    changed=0.9985,
    largest_nats=29.9,
    perplexity_visible=134.87,
    perplexity_random=1034.11,
    perplexity_hidden=527.24,
    code_commit="0123456789abcdef",
    code_dirty=False,
    versions={"python": "3.11.7"},
    command="python scripts/audit.py results/runs/ptb/LN-published-seed1",
    finished_at="2026-01-02T03:04:05+00:00",
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    paths = [tmp_path / "causality" / "ptb" / f"{name}-seed1.json" for name in ("LN", "PN")]
    for path in paths:
        write_causality_record(path, CAUSALITY)
    assert load_causality_records(tmp_path) == dict.fromkeys(paths, CAUSALITY)
    assert load_causality_records(tmp_path / "nowhere") == {}


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"blocks": "many"}, "blocks: Input should be a valid integer"),
        ({"perplexity": 3.0}, "perplexity: Unexpected keyword argument"),
        ({"schema_version": 2}, "schema_version"),
    ],
)
def test_a_bad_file_is_named_with_its_fault(tmp_path: Path, change, cause: str) -> None:
    path = tmp_path / "causality" / "ptb" / "LN-seed1.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(dataclasses.asdict(CAUSALITY) | change), encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_causality_records(tmp_path)
    assert str(path) in str(error.value) and cause in str(error.value)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"LN-seed1\.json"):
        load_causality_records(tmp_path)


def test_the_page_has_a_line_for_each_tested_run_of_the_task(make_record, tmp_path: Path) -> None:
    run = make_record(task="ptb", kind="language_model", label="LN-published")
    rows = rows_by_task({record_path(tmp_path, run): run})
    causality = {
        tmp_path / "causality" / "ptb" / "LN-published-seed1.json": CAUSALITY,
        tmp_path / "causality" / "other" / "PN-seed1.json": dataclasses.replace(
            CAUSALITY, task="other"
        ),
    }
    page = tmp_path / "README.md"
    paper = Paper(tasks={}, values=[], differences=[])
    text = report_files(rows, paper, page, tmp_path, causality)[page]
    assert text.count("Causality test:") == 1
    assert (
        "| LN-published | 1 | yes | 99.9 % | 134.87 | 1034.11 | 527.24 | test, 32 blocks | 0123456 "
        "| [record](causality/ptb/LN-published-seed1.json) |"
    ) in text
