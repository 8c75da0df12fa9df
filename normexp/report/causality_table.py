"""The table of audits: what language models do without the tokens they predict."""

from collections.abc import Mapping
from pathlib import Path

from normexp.report import cells
from normexp.report.cells import Cell, Link, Note, Number, Table
from normexp.runs.causality_record import Audit


def audits_table(task: str, audits: Mapping[Path, Audit]) -> Table:
    """One line per audited run of a task."""
    lines: list[list[Cell]] = []
    for path, audit in audits.items():
        if audit.task != task:
            continue
        perplexities = (audit.perplexity_visible, audit.perplexity_random, audit.perplexity_hidden)
        lines.append(
            [
                audit.label,
                str(audit.seed),
                "yes" if audit.sees_future_tokens else "no",
                Number(f"{100 * audit.changed:.1f} %", audit.changed),
                *(cells.number(value, "perplexity") for value in perplexities),
                f"{audit.split}, {audit.blocks} blocks",
                audit.code_commit[:7],
                [Link("audit", path)],
            ]
        )
    header = [
        "label",
        "seed",
        "sees future tokens",
        "positions that answer to them",
        "PPL, future visible",
        "PPL, future random",
        "PPL, future hidden",
        "measured on",
        "commit",
        "record",
    ]
    note = "PPL per token over the blocks drawn; a causal model has one number three times."
    return Table(header, lines, [Note(note)])
