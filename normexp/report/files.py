"""The files of the report, and whether those on disk are up to date."""

from pathlib import Path

from normexp.errors import UserError
from normexp.report.aggregate import Row
from normexp.report.csv_tables import results_csv, runs_csv
from normexp.report.latex import results_tex
from normexp.report.markdown import results_page
from normexp.report.paper import Paper
from normexp.report.tables import results_table


def report_files(
    rows_by_task: dict[str, list[Row]], paper: Paper, page: Path, home: Path
) -> dict[Path, str]:
    """Content by path: the page, and CSV and LaTeX in `tables/` beside it.

    The same records give the same bytes on every machine. `home` is the folder of PROTOCOL.md.
    """
    tables = page.parent / "tables"
    every_row = [row for rows in rows_by_task.values() for row in rows]
    files = {
        page: results_page(rows_by_task, paper, page, home),
        tables / "runs.csv": runs_csv(every_row, page.parent),
    }
    for task, rows in rows_by_task.items():
        published = paper.task(task)
        title = published.title if published else task
        content = results_table(task, rows, paper)
        files[tables / f"{task}.csv"] = results_csv(rows, paper, page.parent)
        files[tables / f"{task}.tex"] = results_tex(content, title, f"tab:{task}")
    return files


def write_files(files: dict[Path, str]) -> None:
    """Write them, with the same line ends everywhere."""
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")


def check_files(files: dict[Path, str]) -> None:
    """Raise UserError naming the files that differ from the records or belong to none."""
    stale = [
        path
        for path, text in files.items()
        if not path.is_file() or path.read_bytes() != text.encode()
    ]
    if stale:
        names = ", ".join(map(str, stale))
        raise UserError(f"out of date: {names}; run `python scripts/report.py`")
    folders = {path.parent for path in files if path.parent.name == "tables"}
    orphans = {path for folder in folders for path in folder.iterdir()} - files.keys()
    if orphans:
        names = ", ".join(map(str, sorted(orphans)))
        raise UserError(f"made from no record: {names}; delete what is not needed")
