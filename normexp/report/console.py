"""The tables in a terminal."""

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from normexp.report.aggregate import Row
from normexp.report.paper import Paper
from normexp.report.result_tables import differences_table, results_tables
from normexp.report.table import Table


def print_results(rows_by_task: dict[str, list[Row]], paper: Paper, console: Console) -> None:
    """Print results and differences of every task that has records."""
    for task, rows in rows_by_task.items():
        for budget, content in results_tables(task, rows, paper):
            print_table(f"{task}: {budget}" if budget else task, content, console)
        compared = differences_table(task, rows, paper)
        if compared.rows:
            print_table(f"{task}: differences on the same seeds", compared, console)


def print_table(title: str, content: Table, console: Console) -> None:
    """Print one table, without the links to its records, and its notes."""
    shown = [i for i, name in enumerate(content.header) if name != "records"]
    table = RichTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for i in shown:
        table.add_column(content.header[i], justify="left" if i == shown[0] else "right")
    for row in content.rows:
        # Text, because square brackets are markup to rich.
        table.add_row(*(Text(str(row[i])) for i in shown))
    console.print(table)
    _print_notes((note.text for note in content.notes), console)


def _print_notes(notes: Iterable[str], console: Console) -> None:
    for note in notes:
        console.print(Text(f"  {note}"))
    console.print()
