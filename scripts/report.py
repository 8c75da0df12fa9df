#!/usr/bin/env python
"""Make the tables of the results from the records of the runs.

python scripts/report.py                    # README.md, tables/, figures/ in FOLDER, printed too
python scripts/report.py --html             # and FOLDER/report.html, one page for a browser
python scripts/report.py --console-only     # print, write nothing
python scripts/report.py --results results  # of the committed records, this repository's README too
python scripts/report.py --check            # fail if files of the committed records are out of date

FOLDER is results/own, where runs leave their records, or results while there are none; beside the
runs of a task in results/own the tables show the committed ones.
"""

from pathlib import Path

from normexp.config import terminal
from normexp.config.command_grammar import Parser
from normexp.errors import UserError, exit_on_user_error
from normexp.files import whole_file
from normexp.paths import OWN_RESULTS, REPOSITORY, RESULTS
from normexp.report.aggregate import rows_by_task
from normexp.report.benchmark_tables import load_benchmarks
from normexp.report.console import print_results
from normexp.report.html import report_html, unfinished_runs
from normexp.report.paper import load_paper
from normexp.report.report_files import check_files, report_files, write_files
from normexp.runs import evidence
from normexp.runs.causality_record import load_causality_records
from normexp.runs.provenance import utc_now


def main() -> None:
    """Parse the command line, then write and print the tables, or check them."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--results", type=Path, help="folder that holds records/ (results/own, or results)"
    )
    parser.add_argument(
        "--output", type=Path, help="page to write, with tables/ beside it (RESULTS/README.md)"
    )
    parser.add_argument(
        "--paper", type=Path, default=RESULTS / "paper.yaml", help="published numbers (%(default)s)"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--html",
        action="store_true",
        help="also write RESULTS/report.html, the same and more on one page for a browser",
    )
    what.add_argument("--console-only", action="store_true", help="print, write no file")
    what.add_argument("--check", action="store_true", help="fail if the files are out of date")
    options = parser.parse_args()

    if options.results is None:
        own = (OWN_RESULTS / "records").is_dir() and not options.check
        options.results = OWN_RESULTS if own else RESULTS
    if not options.results.is_dir():
        raise UserError(f"no folder {options.results}; train something first, or correct --results")
    rows = rows_by_task(evidence.load_records_beside(options.results))
    causality = load_causality_records(options.results)
    benchmarks = load_benchmarks(options.results)
    paper = load_paper(options.paper)
    page = options.output or options.results / "README.md"
    # The README at the top shows the results of this repository, not those of another folder.
    readme = REPOSITORY / "README.md" if page.resolve() == RESULTS / "README.md" else None
    if not options.console_only:
        files = report_files(rows, paper, page, options.paper.parent, causality, benchmarks, readme)
    if options.check:
        check_files(files)
        return
    console = terminal.console()
    print_results(rows, paper, console)
    if not rows:
        console.print(f"no records below {options.results}/records yet")
    if not options.console_only:
        write_files(files)
        console.print(f"written: {page} and {page.parent}/tables")
    if options.html:
        path = options.results / "report.html"
        text = report_html(rows, paper, causality, unfinished_runs(options.results), utc_now())
        with whole_file(path) as file:
            file.write(text)
        console.print(f"written: {path} ({len(text.encode()) / 1e6:.2f} MB); open it in a browser")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
