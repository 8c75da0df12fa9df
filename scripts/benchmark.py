#!/usr/bin/env python
"""Run a benchmark: measure, print the tables and write the record to results/own/benchmarks/.

    python scripts/benchmark.py norms                           # every layer against nn.LayerNorm
    python scripts/benchmark.py norms --rounds 5 --output fast.json
    python scripts/promote.py results/own/benchmarks/norms.json    # into the committed results

Numbers are comparable only within one record; leave the machine alone meanwhile.
"""

import logging
import sys
from pathlib import Path
from typing import Any

from normexp.benchmarks import suite
from normexp.config.command_grammar import Parser
from normexp.errors import UserError, exit_on_user_error
from normexp.paths import OWN_RESULTS, RESULTS

RECORDS = OWN_RESULTS / "benchmarks"


def main() -> None:
    """Parse the command line, measure, print."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, benchmark in suite.BENCHMARKS.items():
        command = commands.add_parser(
            name, help=benchmark.summary, description=benchmark.description
        )
        for option, number in (benchmark.options | {"threads": suite.THREADS}).items():
            default = "" if number.default is None else "(%(default)s)"
            command.add_argument(
                f"--{option}",
                type=number.parse,
                default=number.default,
                help=f"{number.help} {default}",
            )
        if benchmark.has_folder:
            command.add_argument(
                "--folder", type=Path, help="for a temporary folder (the system's)"
            )
        command.add_argument(
            "--output", type=Path, default=RECORDS / f"{name}.json", help="record (%(default)s)"
        )
    arguments = vars(parser.parse_args())
    name, output = arguments.pop("benchmark"), arguments.pop("output")
    if output.resolve().parent == RESULTS / "benchmarks":
        raise UserError(
            f"--output {output} is a committed record, which measuring does not change; choose "
            "another and add it by scripts/promote.py"
        )
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("normexp.benchmarks").setLevel(logging.INFO)
    _show(name, suite.measure(name, output, sys.stderr.isatty(), **arguments))
    print(f"Record: {output}")


def _show(benchmark: str, record: dict[str, Any]) -> None:
    from normexp.config import terminal
    from normexp.report.benchmark_tables import tables
    from normexp.report.console import print_table

    console = terminal.console()
    for title, table in tables(benchmark, record):
        print_table(title, table, console)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
