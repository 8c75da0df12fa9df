"""Resuming from another checkpoint than the last, and repeating training up to a lost one."""

from pathlib import Path

import pytest
from support.checkpoint_files import write

from normexp.checkpoints import recovery, store
from normexp.errors import UserError


def test_newest_readable_checkpoint(tmp_path: Path) -> None:
    assert recovery.latest_readable(tmp_path) is None
    write(tmp_path / "checkpoint1.pt", [1.0], 10)
    write(tmp_path / "checkpoint_2_15.pt", [1.5], 15)
    last = write(tmp_path / "checkpoint_last.pt", [2.0], 20)
    path, state = recovery.latest_readable(tmp_path)
    assert path == last and state["model"]["w"] == 2
    last.write_bytes(last.read_bytes()[:100])
    path, state = recovery.latest_readable(tmp_path)
    assert path.name == "checkpoint_2_15.pt" and state["model"]["w"] == 1.5
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="to train anew"):
        recovery.latest_readable(tmp_path)


def test_average_without_a_gap(tmp_path: Path) -> None:
    for epoch in (2, 4, 6, 10):
        write(tmp_path / f"checkpoint{epoch}.pt", [float(epoch)], epoch)
    assert store.select(tmp_path, "average", 1)[0].name == "checkpoint10.pt"
    with pytest.raises(store.Lost, match=r"checkpoint8\.pt is missing") as lost:
        store.select(tmp_path, "average", 4, save_interval=2)
    source = recovery.rewind_to_before(tmp_path, lost.value)
    assert source.name == "checkpoint6.pt"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint2.pt", "checkpoint4.pt", "checkpoint6.pt"}
    (tmp_path / "checkpoint4.pt").unlink()
    assert store.select(tmp_path, "average", 1, save_interval=2)[0] == source


def test_nothing_is_removed_where_there_is_no_way_back(tmp_path: Path) -> None:
    for epoch in (3, 4):
        write(tmp_path / f"checkpoint{epoch}.pt", [float(epoch)], epoch)
    lost = store.Lost(tmp_path / "checkpoint2.pt", "lost")
    with pytest.raises(UserError, match="no earlier one is left"):
        recovery.rewind_to_before(tmp_path, lost)
    assert len(list(tmp_path.iterdir())) == 2
