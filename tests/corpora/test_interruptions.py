"""A preparation that is killed, finds the disk full, or has company, at every point of its way.

The points are the moments at which it opens a file for writing, renames or deletes one: Python
announces these to an audit hook, which kills the process or refuses. Hooks cannot be taken back,
so each preparation is a child process; forked, since imports would take longer than all the rest.
"""

import errno
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.stand_ins import archive_entry, iwslt14_members, tar_gz

from normexp.corpora import PreparedCorpus, prepare
from normexp.errors import UserError

CONTEXT = multiprocessing.get_context("fork")
PAIRS = [(f"Der Satz {n} ist da.", f"The sentence {n} is there.") for n in range(50)]
WRITING = {"os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.mkdir"}
STAGES = {
    "download": r"archives/de-en\.tgz",
    "raw text": r"raw\.partial",
    "tokenization": r"text\.partial/(tokenized|reference|steps)",
    "BPE": r"text\.partial/bpe",
    "binarization": r"data-bin\.partial",
    "manifest": r"manifest\.json",
}


@pytest.fixture
def start(tmp_path, catalogue_with, mirror) -> Callable[[Path], PreparedCorpus]:
    """Prepares a stand-in of IWSLT14, with all stages, from a URL."""
    archive = tar_gz(iwslt14_members(PAIRS))
    mirror.files["/de-en.tgz"] = archive
    entry = archive_entry("de-en.tgz", archive, [f"{mirror.url}/de-en.tgz"])
    steps = {f"text/steps/train.tokenize.{lang}": "sha256:0" for lang in ("de", "en")}
    catalogue = catalogue_with(
        "iwslt14", archives={"de-en": [entry]}, expected={"hashes": steps}, bpe_merges=30
    )

    def run(data_dir: Path) -> PreparedCorpus:
        return prepare("iwslt14", data_dir, progress=False, catalogue=catalogue)

    return run


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a corpus folder; locks are none."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def points_below(folder: Path, react: Callable[[int, str], None]) -> None:
    """From now on calls `react` with number and name of each point that concerns `folder`."""
    number = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal number
        if event == "open":
            path, _, flags = arguments
            if not (isinstance(path, str) and flags & (os.O_WRONLY | os.O_RDWR)):
                return
        elif event in WRITING:
            path = arguments[0]
        else:
            return
        path = os.fspath(path)
        if isinstance(path, str) and path.startswith(str(folder)):
            number += 1
            name = re.sub(r"\.\d+\.partial", ".partial", path.removeprefix(f"{folder}/"))
            react(number, f"{event} {name}")

    sys.addaudithook(hook)


def in_child(function: Callable[[], None]) -> int:
    """The exit code of a forked process that calls `function`; 3 stands for a UserError."""

    def main() -> None:
        try:
            function()
        except UserError as error:
            assert "cannot write to" in str(error), error
            os._exit(3)

    child = CONTEXT.Process(target=main)
    child.start()
    child.join(60)
    assert child.exitcode is not None, "it hangs"
    return child.exitcode


@pytest.fixture
def undisturbed(start, tmp_path) -> dict[str, bytes]:
    """The files of a preparation that nothing happened to."""
    return contents(start(tmp_path / "undisturbed").directory)


def recorded_points(start, folder: Path) -> dict[str, int]:
    """The first number of every point's name, from one more undisturbed preparation."""
    reader, writer = CONTEXT.Pipe(duplex=False)

    def record() -> None:
        points_below(folder, lambda number, name: writer.send((name, number)))
        start(folder)

    assert in_child(record) == 0
    points: dict[str, int] = {}
    while reader.poll():
        points.setdefault(*reader.recv())
    return points


def kill(number: int, name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(number: int, name: str) -> None:
    if name.startswith(("open", "os.mkdir")):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)


@pytest.mark.parametrize(("react", "status"), [(kill, -signal.SIGKILL), (refuse, 3)])
def test_any_point(start, undisturbed, tmp_path, react, status: int) -> None:
    """Killed there, or with a disk that is full from there on, and then run again."""
    points = recorded_points(start, tmp_path / "recorded")
    for stage, pattern in STAGES.items():
        assert any(re.search(pattern, name) for name in points), (stage, points)
    for name, point in points.items():
        folder = tmp_path / f"{react.__name__}-{point}"

        def disturbed(folder=folder, point=point) -> None:
            points_below(folder, lambda *reached: reached[0] >= point and react(*reached))
            start(folder)

        found = in_child(disturbed)
        # Where nothing more was to be written a full disk does no harm.
        assert found == status or (react is refuse and found == 0 and name.startswith("os.re")), (
            name
        )
        assert contents(start(folder).directory) == undisturbed, name


def test_full_disk(start, undisturbed, tmp_path) -> None:
    """A real one, of several sizes; with room again the same command goes on."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not permitted here")
    try:
        stopped = 0
        for size in range(16, 1024, 8):
            resize = ["mount", "-o", f"remount,size={size}k", str(folder)]
            subprocess.run(resize, check=True)
            status = in_child(lambda: start(folder))
            if status == 0:
                break
            assert status == 3
            stopped += 1
        assert stopped > 8
        assert contents(folder / "iwslt14") == undisturbed
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_several_at_once(start, undisturbed, tmp_path, mirror) -> None:
    del mirror.requests[:]
    children = [CONTEXT.Process(target=start, args=(tmp_path / "shared",)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 4
    assert contents(tmp_path / "shared" / "iwslt14") == undisturbed
    assert mirror.requests == ["/de-en.tgz"]
