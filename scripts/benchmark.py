#!/usr/bin/env python
"""Run a benchmark: measure, print the tables and write the record to results/own/benchmarks/.

    python scripts/benchmark.py norms                           # every layer against nn.LayerNorm
    python scripts/benchmark.py norms --rounds 5 --output fast.json
    python scripts/benchmark.py all                             # every benchmark: 20 minutes
    python scripts/promote.py results/own/benchmarks/norms.json    # into the committed results

Numbers are comparable only within one record; leave the machine alone meanwhile.
"""

import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from normexp.benchmarks import suite
from normexp.config.command_grammar import Parser
from normexp.errors import UserError, exit_on_user_error
from normexp.paths import OWN_RESULTS, RESULTS

RECORDS = OWN_RESULTS / "benchmarks"
ALL = "all"


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
        for path, text in benchmark.paths.items():
            command.add_argument(f"--{path}", type=Path, help=text)
        for flag, text in benchmark.flags.items():
            command.add_argument(f"--{flag}", action="store_true", help=text)
        command.add_argument(
            "--output", type=Path, default=RECORDS / f"{name}.json", help="record (%(default)s)"
        )
    every = commands.add_parser(
        ALL,
        help="every benchmark with fewer rounds: 20 minutes on two cores",
        description="Runs every benchmark in a process of its own, with fewer rounds than alone.",
    )
    every.add_argument(
        "--output", type=Path, default=RECORDS, help="folder of the records (%(default)s)"
    )
    arguments = vars(parser.parse_args())
    name, output = arguments.pop("benchmark"), arguments.pop("output")
    folder = output if name == ALL else output.parent
    if folder.resolve() == RESULTS / "benchmarks":
        kind = "has the committed records" if name == ALL else "is a committed record"
        raise UserError(
            f"--output {output} {kind}, which measuring does not change; choose another and add "
            "what you want to keep by scripts/promote.py"
        )
    if name == ALL:
        sys.exit(_run_all(output))
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("normexp.benchmarks").setLevel(logging.INFO)
    _show(name, suite.measure(name, output, sys.stderr.isatty(), **arguments))
    print(f"Record: {output}")


def _run_all(folder: Path) -> int:
    """Run every benchmark that this machine can; say what was left out. 1 if one failed."""
    import torch  # here, because it takes a second to load, and --help should not

    outcomes = {}
    for name, arguments in suite.commands_of_all(folder).items():
        if suite.BENCHMARKS[name].needs_gpu and not torch.cuda.is_available():
            outcomes[name] = "skipped: there is no GPU"
            continue
        print(f"== {name}", flush=True)
        started = time.monotonic()
        status = subprocess.run([sys.executable, __file__, *arguments]).returncode
        seconds = time.monotonic() - started
        outcomes[name] = f"{seconds:.0f} s" if status == 0 else f"FAILED with status {status}"
    print("== all")
    for name, outcome in outcomes.items():
        print(f"{name}: {outcome}")
    return int(any(outcome.startswith("FAILED") for outcome in outcomes.values()))


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
