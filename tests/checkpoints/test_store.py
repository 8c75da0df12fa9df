"""Averages by hand, damaged and hostile files, copies that are whole or absent."""

import pickle
import shutil
import struct
from pathlib import Path
from typing import IO

import pytest
import torch
from support.checkpoint_files import write

from normexp.checkpoints import store
from normexp.errors import UserError


def test_average_is_the_mean_and_counters_are_the_newest(tmp_path: Path) -> None:
    for epoch, values in ((7, [9.0, 9.0]), (8, [1.0, 2.0]), (9, [4.0, 6.0]), (10, [1.0, 7.0])):
        write(tmp_path / f"checkpoint{epoch}.pt", values, step=10 * epoch)
    write(tmp_path / "checkpoint_last.pt", [0.0, 0.0], 100)
    path, description = store.select(tmp_path, "average", 3)
    model = store.load(path)["model"]
    assert model["w"].tolist() == [2.0, 5.0] and model["w"].dtype == torch.float32
    assert model["norm.step"] == 100
    assert description == "average of epochs 8, 9, 10"


def test_average_of_what_there_is(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint_last.pt", [3.0], 5)
    assert store.select(tmp_path, "average", 5)[0].name == "checkpoint_last.pt"
    write(tmp_path / "checkpoint1.pt", [1.0], 5)
    assert store.select(tmp_path, "average", 5)[0].name == "checkpoint1.pt"


def test_average_of_different_models_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint1.pt", [1.0], 1)
    torch.save({"model": {"v": torch.ones(1)}}, tmp_path / "checkpoint2.pt")
    with pytest.raises(UserError, match="different models"):
        store.select(tmp_path, "average", 2)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half of a checkpoint", None])
def test_damaged_checkpoint_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoint_last.pt", [1.0] * 1000, 1)
    path.write_bytes(path.read_bytes()[:-500] if content is None else content)
    with pytest.raises(UserError, match=r"checkpoint_last\.pt is damaged"):
        store.load(path)


def test_missing_and_foreign_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no checkpoint"):
        store.load(tmp_path / "checkpoint_best.pt")
    torch.save([1], tmp_path / "other.pt")
    with pytest.raises(UserError, match="not a fairseq checkpoint"):
        store.load(tmp_path / "other.pt")


class Hostile:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize("plain_pickle", [True, False])
def test_hostile_checkpoint_runs_nothing(plain_pickle, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint_last.pt"
    if plain_pickle:
        path.write_bytes(pickle.dumps({"model": Hostile()}))
    else:
        torch.save({"model": Hostile()}, path)
    with pytest.raises(UserError, match="damaged or not to be trusted"):
        store.load(path)
    assert not (tmp_path / "executed").exists()


def test_copy_is_whole_or_absent(tmp_path: Path, monkeypatch) -> None:
    """A copy cut off half-way (a kill, a full disk) leaves the earlier file as it was."""
    from fairseq.file_io import PathManager

    old, new = tmp_path / "checkpoint_last.pt", tmp_path / "checkpoint2.pt"
    old.write_bytes(b"old and whole")
    new.write_bytes(b"new")

    def cut_off(source: IO[bytes], target: IO[bytes]) -> None:
        target.write(source.read(2))
        raise OSError(28, "No space left on device")

    (tmp_path / "checkpoint1.pt.part").write_bytes(b"half of one that a killed process wrote")
    with store.atomic_writes(tmp_path):
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "copyfileobj", cut_off)
            with pytest.raises(OSError, match="No space"):
                PathManager.copy(str(new), str(old), overwrite=True)
        assert old.read_bytes() == b"old and whole" and len(list(tmp_path.iterdir())) == 2
        assert PathManager.copy(str(new), str(old), overwrite=True)
    assert old.read_bytes() == b"new"


def test_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """In every byte of a tensor; torch itself reads such a file without an error."""
    path = write(tmp_path / "checkpoint1.pt", [1.0, -2.0], 1)
    whole = path.read_bytes()
    tensor = struct.pack("<ff", 1.0, -2.0)
    assert whole.count(tensor) == 1
    for place in range(len(tensor)):
        content = bytearray(whole)
        content[whole.index(tensor) + place] ^= 1 << (place % 8)
        path.write_bytes(content)
        assert torch.load(path)["model"]["w"].tolist() != [1.0, -2.0]
        with pytest.raises(UserError, match=r"checkpoint1\.pt is damaged .* checksum"):
            store.load(path)
