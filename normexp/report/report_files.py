"""The files of the report: their content, writing them, and checking those on disk."""

from collections.abc import Mapping
from pathlib import Path

from normexp.errors import UserError
from normexp.report.aggregate import Row
from normexp.report.benchmark_tables import Benchmarks
from normexp.report.csv_tables import results_csv, runs_csv
from normexp.report.figures import curves_svg, digest_of, norms_svg, scaling_svg
from normexp.report.latex import results_tex
from normexp.report.markdown import benchmarks_page, results_page
from normexp.report.paper import Paper
from normexp.report.readme import readme_with_results
from normexp.report.result_tables import results_tables
from normexp.runs.causality_record import CausalityRecord


def report_files(
    rows_by_task: dict[str, list[Row]],
    paper: Paper,
    page: Path,
    home: Path,
    causality: Mapping[Path, CausalityRecord] | None = None,
    benchmarks: Benchmarks | None = None,
    readme: Path | None = None,
) -> dict[Path, str]:
    """Give the content of every file by its path.

    The files are `page`, and beside it CSV and LaTeX in `tables/`, `figures/` and, if there are
    records of benchmarks, `benchmarks/README.md`; with `readme` also that file with its block of
    results renewed. The same records give the same bytes on every machine, except for figures.

    home: the folder of PROTOCOL.md and of `benchmarks/`, the records of benchmarks.
    """
    tables, figures = page.parent / "tables", page.parent / "figures"
    every_row = [row for rows in rows_by_task.values() for row in rows]
    curves = {
        task: (figures / f"{task}.svg", svg)
        for task, rows in rows_by_task.items()
        if (svg := curves_svg(rows))
    }
    figure_of = {task: path for task, (path, _) in curves.items()}
    speed = _benchmark_files(benchmarks, page, home) if benchmarks and benchmarks.records else {}
    speed_page = next(iter(speed), None)
    files = {
        page: results_page(rows_by_task, paper, page, home, figure_of, causality or {}, speed_page),
        tables / "runs.csv": runs_csv(every_row, page.parent),
        **dict(curves.values()),
        **speed,
    }
    if readme is not None:
        files[readme] = readme_with_results(readme, rows_by_task, paper, page)
    for task, rows in rows_by_task.items():
        published = paper.task(task)
        title = published.title if published else task
        files[tables / f"{task}.csv"] = results_csv(rows, paper, page.parent)
        files[tables / f"{task}.tex"] = "\n".join(
            results_tex(
                content,
                f"{title}: {budget}" if budget else title,
                f"tab:{task}" + (f"-{number}" if number > 1 else ""),
            )
            for number, (budget, content) in enumerate(results_tables(task, rows, paper), 1)
        )
    return files


def _benchmark_files(benchmarks: Benchmarks, page: Path, home: Path) -> dict[Path, str]:
    """Give the page of the benchmarks first, then its figures."""
    drawn = {
        name: (page.parent / "figures" / f"benchmark_{name}.svg", draw(record["measured"]))
        for name, draw in (("norms", norms_svg), ("scaling", scaling_svg))
        if (record := benchmarks.records.get(name))
    }
    figures = {name: path for name, (path, _) in drawn.items()}
    own = page.parent / "benchmarks" / "README.md"
    text = benchmarks_page(benchmarks, own, home / "benchmarks", figures)
    return {own: text, **dict(drawn.values())}


def write_files(files: dict[Path, str]) -> None:
    """Write the files with the same line ends on every system."""
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")


def check_files(files: dict[Path, str]) -> None:
    """Raise UserError that names the files that differ from the records or belong to none."""
    stale = [path for path, text in files.items() if not path.is_file() or not _same(path, text)]
    if stale:
        names = ", ".join(map(str, stale))
        raise UserError(f"out of date: {names}; run `python scripts/report.py --results results`")
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
