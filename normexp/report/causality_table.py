"""The table of causality tests: what language models do without the tokens they predict."""

import math
from collections.abc import Mapping
from pathlib import Path

from normexp.report import formatting
from normexp.report.table import Cell, Link, Note, Number, Table
from normexp.runs.causality_record import CausalityRecord

CAUSALITY_TITLE = "Causality test"


def causality_table(task: str, causality: Mapping[Path, CausalityRecord]) -> Table:
    """Tabulate the tested runs of a task.

    causality: the records by path, of any task.
    """
    lines: list[list[Cell]] = []
    for path, record in causality.items():
        if record.task != task:
            continue
        lines.append(
            [
                record.label,
                str(record.seed),
                "yes" if record.sees_future_tokens else "no",
                Number(f"{100 * record.changed:.1f} %", record.changed),
                formatting.number(_infinite_if_null(record.perplexity_visible), "perplexity"),
                formatting.number(_infinite_if_null(record.perplexity_random), "perplexity"),
                formatting.number(_infinite_if_null(record.perplexity_hidden), "perplexity"),
                f"{record.split}, {record.blocks} blocks",
                record.code_commit[:7],
                [Link("record", path)],
            ]
        )
    header = [
        "label",
        "seed",
        "sees future tokens",
        "positions affected",
        "PPL, future visible",
        "PPL, future random",
        "PPL, future hidden",
        "measured on",
        "commit",
        "record",
    ]
    note = (
        "PPL per token over the blocks drawn, with the future tokens visible, replaced at random "
        "and hidden; the three are equal for a causal model."
    )
    return Table(header, lines, [Note(note)])


def _infinite_if_null(perplexity: float | None) -> float:
    return math.inf if perplexity is None else perplexity
