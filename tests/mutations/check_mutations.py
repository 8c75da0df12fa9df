"""Would the tests notice a fault? Put faults into the code, one at a time, and see.

    python tests/mutations/check_mutations.py              # all faults; writes RESULT.md
    python tests/mutations/check_mutations.py WORD ...     # those with a WORD in file or name

Each fault is one line, put into a copy of the project in a temporary folder; the tests named for it
run there until the first one fails. Two processes share the faults. Prints which test noticed which
fault, and ends with status 1 if a fault survived. All faults take about half an hour, so this is no
test itself; test_mutations.py checks that every line to be replaced is still there.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from queue import Queue

from fault import Fault
from faults_of_corpora import CORPORA
from faults_of_evaluation import EVALUATION
from faults_of_norms import NORMS
from faults_of_own_corpora import OWN_CORPORA
from faults_of_plugin import PLUGIN
from faults_of_runs import RUNS
from faults_of_training import TRAINING

REPOSITORY = Path(__file__).resolve().parents[2]
RESULT = Path(__file__).with_name("RESULT.md")
PROCESSES = 2
FAULTS: list[Fault] = [*NORMS, *RUNS, *TRAINING, *EVALUATION, *CORPORA, *OWN_CORPORA, *PLUGIN]


@contextmanager
def copies_of_the_project() -> Iterator[Queue]:
    """Folders with the project's files, one for each process."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(listed, cwd=REPOSITORY, text=True).split("\0")[:-1]
    with tempfile.TemporaryDirectory() as temporary:
        folders: Queue[Path] = Queue()
        for number in range(PROCESSES):
            folder = Path(temporary) / str(number)
            for name in names:
                if (REPOSITORY / name).is_file():  # not one that was deleted since the last commit
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(REPOSITORY / name, folder / name)
            folders.put(folder)
        yield folders


def first_failure(folder: Path, tests: tuple[str, ...]) -> str | None:
    """The first test that fails in the copy, None if all pass."""
    names = [test.partition("::") for test in tests]
    chosen = [f"tests/{file}.py{separator}{test}" for file, separator, test in names]
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"),
            *("-m", "not thorough", *chosen),
        ],
        cwd=folder,
        env=os.environ
        | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if run.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.MULTILINE)
    if run.returncode == 1 and failed:
        return failed[1].removeprefix("tests/")
    if run.returncode == 2 and failed:  # the fault breaks the import of the tests
        return failed[1].removeprefix("tests/")
    raise RuntimeError(f"pytest did not get as far as a test:\n{run.stdout}{run.stderr}")


def try_fault(fault: Fault, folders: Queue) -> str | None:
    """The test that notices a fault, None if it survives."""
    folder = folders.get()
    path = folder / "normexp" / fault.file
    sound = path.read_text(encoding="utf-8")
    try:
        path.write_text(sound.replace(fault.old, fault.new), encoding="utf-8", newline="\n")
        noticed = first_failure(folder, fault.tests)
    finally:
        path.write_text(sound, encoding="utf-8", newline="\n")
        folders.put(folder)
    print(f"{fault.file:40} {fault.what:65} {noticed or 'SURVIVED'}", flush=True)
    return noticed


def check_without_faults(faults: list[Fault], folders: Queue) -> None:
    """Leave with a message if one of the tests fails without any fault."""
    needed = tuple(dict.fromkeys(test for fault in faults for test in fault.tests))
    files = {test for test in needed if "::" not in test}
    once = tuple(test for test in needed if test in files or test.partition("::")[0] not in files)
    folder = folders.get()
    failure = first_failure(folder, once)
    folders.put(folder)
    if failure:
        raise SystemExit(f"{failure} fails without any fault; correct that first")


def write_result(noticed: dict[Fault, str | None]) -> None:
    """The table that is committed."""
    git = ["git", "-C", str(REPOSITORY), "rev-parse", "--short=12", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    found = sum(test is not None for test in noticed.values())
    lines = [
        "# Deliberate faults and the tests that notice them",
        "",
        f"{found} of {len(noticed)} faults noticed. Made by "
        "`python tests/mutations/check_mutations.py` "
        f"on {datetime.now(UTC):%Y-%m-%d}, code after commit {commit}.",
        "",
        "| File | Fault | Noticed by |",
        "| --- | --- | --- |",
        *(
            f"| {fault.file} | {fault.what} | {test or '**not noticed**'} |"
            for fault, test in noticed.items()
        ),
    ]
    RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(words: list[str]) -> int:
    faults = [f for f in FAULTS if not words or any(w in f"{f.file} {f.what}" for w in words)]
    with copies_of_the_project() as folders:
        check_without_faults(faults, folders)
        with ThreadPoolExecutor(PROCESSES) as pool:
            found = list(pool.map(lambda fault: try_fault(fault, folders), faults))
    noticed = dict(zip(faults, found, strict=True))
    if not words:
        write_result(noticed)
    survived = found.count(None)
    print(f"{len(faults) - survived} of {len(faults)} faults noticed")
    return 1 if survived else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
