"""The lock of a preparation ends with the process that took it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from filelock import FileLock
from support.processes import is_running


def test_forked_children_of_a_killed_process_do_not_keep_its_lock(tmp_path: Path) -> None:
    path = tmp_path / "corpus.lock"
    program = (
        "import os, time; from pathlib import Path; "
        "from normexp.corpora.atomic_stage import locked\n"
        f"with locked(Path({str(path)!r})):\n"
        "    child = os.fork()\n"
        "    if child:\n"
        "        print(child, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as process:
        child = int(process.stdout.readline())
        process.kill()
        process.wait()
        try:
            with FileLock(path, timeout=10):
                assert is_running(child)
        finally:
            os.kill(child, signal.SIGKILL)
