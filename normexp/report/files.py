"""The files of the report, and whether those on disk are up to date."""

from collections.abc import Mapping
from pathlib import Path

from normexp.audits import Audit
from normexp.errors import UserError
from normexp.report.aggregate import Row
from normexp.report.csv_tables import results_csv, runs_csv
from normexp.report.figures import curves_svg, digest_of
from normexp.report.latex import results_tex
from normexp.report.markdown import results_page
from normexp.report.paper import Paper
from normexp.report.tables import results_table


def report_files(
    rows_by_task: dict[str, list[Row]],
    paper: Paper,
    page: Path,
    home: Path,
    audits: Mapping[Path, Audit] | None = None,
) -> dict[Path, str]:
    """Content by path: the page, CSV and LaTeX in `tables/` and curves in `figures/` beside it.

    The same records give the same bytes on every machine, figures apart. `home` is the folder of
    PROTOCOL.md.
    """
    tables, figures = page.parent / "tables", page.parent / "figures"
    every_row = [row for rows in rows_by_task.values() for row in rows]
    curves = {
        task: (figures / f"{task}.svg", svg)
        for task, rows in rows_by_task.items()
        if (svg := curves_svg(rows))
    }
    figure_of = {task: path for task, (path, _) in curves.items()}
    files = {
        page: results_page(rows_by_task, paper, page, home, figure_of, audits or {}),
        tables / "runs.csv": runs_csv(every_row, page.parent),
        **dict(curves.values()),
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
    stale = [path for path, text in files.items() if not path.is_file() or not _same(path, text)]
    if stale:
        names = ", ".join(map(str, stale))
        raise UserError(f"out of date: {names}; run `python scripts/report.py`")
    pages = {path.parent.parent for path in files if path.parent.name == "tables"}
    made = [page / name for page in pages for name in ("tables", "figures")]
    orphans = {path for folder in made for path in folder.glob("*")} - files.keys()
    if orphans:
        names = ", ".join(map(str, sorted(orphans)))
        raise UserError(f"made from no record: {names}; delete what is not needed")


def _same(path: Path, text: str) -> bool:
    if path.suffix == ".svg":
        return digest_of(path.read_text(encoding="utf-8")) == digest_of(text)
    return path.read_bytes() == text.encode()
