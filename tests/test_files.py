"""Files are whole or absent, also where processes write the same one, die, or links lie about."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from normexp.files import open_own, remove_unfinished, whole_file, write_json

FORK = multiprocessing.get_context("fork")
BYTES = 20_000


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def write_often(path: Path, letter: bytes) -> None:
    for _ in range(150):
        with whole_file(path, "wb") as file:
            file.write(letter * BYTES)


def test_processes_that_write_the_same_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    writers = [FORK.Process(target=write_often, args=(path, letter)) for letter in (b"a", b"b")]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            assert path.read_bytes() in (b"a" * BYTES, b"b" * BYTES)
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert names(tmp_path) == {"record.json"}


@pytest.mark.parametrize("link", ["record.json.part", "record.json.0123456789abcdef.part"])
def test_a_link_in_the_place_of_a_partial_file_is_not_followed(tmp_path: Path, link: str) -> None:
    (tmp_path / "results").mkdir()
    other = tmp_path / "precious"
    other.write_text("precious", encoding="utf-8")
    (tmp_path / "results" / link).symlink_to(other)
    write_json(tmp_path / "results" / "record.json", 1)
    assert other.read_text(encoding="utf-8") == "precious"
    assert names(tmp_path / "results") == {"record.json"}


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from normexp.files import whole_file\n"
        "with whole_file(Path(sys.argv[1])) as file:\n"
        "    file.write('half'); print(flush=True); sys.stdin.read()\n"
    )
    path = tmp_path / "record.json"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.readline()
        write_json(path, 1)
        [partial] = names(tmp_path) - {"record.json"}
        remove_unfinished(tmp_path)
        assert partial in names(tmp_path)
        process.send_signal(signal.SIGKILL)
    write_json(tmp_path / "other.json", 2)
    assert partial in names(tmp_path)  # of another file: whoever writes that one removes it
    write_json(path, 3)
    assert names(tmp_path) == {"record.json", "other.json"}
    assert path.read_text(encoding="utf-8") == "3\n"


def test_an_error_leaves_the_earlier_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_json(path, "earlier")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as file:
        file.write("half")
        raise KeyboardInterrupt
    assert path.read_text(encoding="utf-8") == '"earlier"\n' and names(tmp_path) == {"record.json"}


def test_others_may_read_as_much_as_the_umask_allows(tmp_path: Path) -> None:
    earlier = os.umask(0o027)
    try:
        write_json(tmp_path / "record.json", 1)
    finally:
        os.umask(earlier)
    assert (tmp_path / "record.json").stat().st_mode & 0o777 == 0o640


def test_the_longest_name_that_a_file_can_have(tmp_path: Path) -> None:
    for name in ("a" * 255, "ü" * 127):
        write_json(tmp_path / name, 1)
    assert names(tmp_path) == {"a" * 255, "ü" * 127}


def test_own_files_are_neither_links_nor_folders(tmp_path: Path) -> None:
    other, link = tmp_path / "precious", tmp_path / "text.partial"
    other.write_text("precious", encoding="utf-8")
    link.symlink_to(other)
    with open(open_own(link, os.O_RDWR | os.O_CREAT), "ab") as file:
        file.write(b"new")
    assert link.read_bytes() == b"new" and not link.is_symlink()
    assert other.read_text(encoding="utf-8") == "precious"
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileExistsError, match="no regular file"):
        open_own(tmp_path / "folder", os.O_RDONLY)
