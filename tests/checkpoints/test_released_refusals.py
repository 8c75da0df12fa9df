"""Files that are not imported: hostile, damaged, of another format, contradictory, in the way."""

import os
import random
import resource
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.authors_format import GOLDEN, RECORDED, arguments, build_model, their_state_dict, write
from torch import Tensor

from normexp.checkpoints import store
from normexp.checkpoints.released import import_checkpoint
from normexp.errors import UserError
from normexp.fairseq_plugin.checkpoint_types import CHECKPOINT_TYPES

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "import_checkpoint.py"
NORMS = ("power", "power", "batch", "layer")


def refused(source: Path, message: str) -> None:
    """Check that the file is refused in one line with its name, and that nothing is written."""
    folder = source.parent
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=message) as error:
        import_checkpoint(source, folder / "out.pt")
    assert str(source) in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 500 + len(str(source))
    assert sorted(folder.iterdir()) == before


@pytest.fixture(scope="module")
def recorded() -> bytes:
    return (GOLDEN / f"{RECORDED[0]}.pt").read_bytes()


class Hostile:
    """Runs a command when it is unpickled without restrictions."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


@pytest.mark.parametrize("place", ["args", "model", "optimizer_history", "extra_state", "more"])
@pytest.mark.parametrize("old_format", [True, False], ids=["pickle", "zip"])
def test_hostile_file_does_not_run(place: str, old_format: bool, tmp_path: Path) -> None:
    args = arguments(NORMS)
    parts: dict[str, Any] = {
        "args": args,
        "model": their_state_dict(build_model(args), args),
        "optimizer_history": [{"num_updates": 3}],
        "extra_state": {},
    }
    parts[place] = [Hostile(os.system, f"touch {tmp_path}/trace")]
    source = tmp_path / "theirs.pt"
    torch.save(parts, source, _use_new_zipfile_serialization=not old_format)
    refused(source, r"refers to (posix|os|nt)\.system, which checkpoints of this format do not")
    assert not (tmp_path / "trace").exists()


def test_allow_list_is_as_before_afterwards(tmp_path: Path) -> None:
    torch.serialization.add_safe_globals(CHECKPOINT_TYPES)  # as importing the plugin does
    allowed = set(torch.serialization.get_safe_globals())
    import_checkpoint(GOLDEN / f"{RECORDED[0]}.pt", tmp_path / "out.pt")
    assert set(torch.serialization.get_safe_globals()) == allowed


@pytest.mark.parametrize(
    ("foreign", "name"),
    [
        (Hostile(eval, "1"), "eval"),
        (torch.nn.ReLU(), r"torch\.nn\.modules\.activation\.ReLU"),
        (Path("x"), r"pathlib\.PosixPath"),
    ],
)
def test_any_other_class_is_named(foreign: Any, name: str, tmp_path: Path) -> None:
    refused(write(tmp_path / "theirs.pt", foreign, {}), f"refers to {name}, which")


@pytest.mark.parametrize("size", [0, 1, 40, 1000, 30_000, 43_000, 60_000, 900_000, -1])
def test_truncated_file(size: int, recorded: bytes, tmp_path: Path) -> None:
    (tmp_path / "theirs.pt").write_bytes(recorded[:size])
    refused(tmp_path / "theirs.pt", "is damaged, cut off or no PyTorch checkpoint")


@pytest.mark.parametrize(
    ("text", "position", "message"),
    [
        (b"optimizer_history", 3, "it has no optimizer_history"),
        (b"encoder_norm_ff", 9, "its arguments lack encoder_norm_ff"),
        (b"power", 0, "is 'qower'; the normalizations .*: layer, batch, power"),
        (b"encoder.layer_norm.ema_gz", 20, "but encoder.layer_norm holds"),
        (b"decoder.layers.1.fc1.bias", 17, r"Missing key.*decoder\.layers\.1\.fc1\.bias"),
        (b"OrderedDict", 1, r"refers to collections\.Osderedict|refers to collections\.Os"),
    ],
)
def test_a_flipped_bit_in_a_name(
    text: bytes, position: int, message: str, recorded: bytes, tmp_path: Path
) -> None:
    flipped = bytearray(recorded)
    flipped[recorded.index(text) + position] ^= 1
    (tmp_path / "theirs.pt").write_bytes(flipped)
    refused(tmp_path / "theirs.pt", message)


def test_a_flipped_bit_anywhere_is_an_error_or_harmless(recorded: bytes, tmp_path: Path) -> None:
    draw = random.Random(0)
    source, target = tmp_path / "theirs.pt", tmp_path / "out.pt"
    outcomes = []
    for _ in range(40):
        flipped = bytearray(recorded)
        # the pickles; the rest of the file are numbers
        flipped[draw.randrange(49_000)] ^= 1 << draw.randrange(8)
        source.write_bytes(flipped)
        target.unlink(missing_ok=True)
        try:
            import_checkpoint(source, target)
        except UserError:
            assert list(tmp_path.iterdir()) == [source]
            outcomes.append("refused")
        else:
            assert store.load(target)["model"]
            outcomes.append("imported")
    assert outcomes.count("refused") > 12


def test_files_that_are_something_else(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere.pt", "there is no checkpoint")
    (tmp_path / "folder.pt").mkdir()
    refused(tmp_path / "folder.pt", "cannot read .*: Is a directory")
    (tmp_path / "text.pt").write_text("no checkpoint\n", encoding="utf-8")
    refused(tmp_path / "text.pt", "is damaged, cut off or no PyTorch checkpoint")
    torch.save([1, 2], tmp_path / "list.pt")
    refused(tmp_path / "list.pt", "no checkpoint of the PowerNorm authors' code: it has no args")
    import_checkpoint(GOLDEN / f"{RECORDED[0]}.pt", tmp_path / "imported.pt")
    refused(tmp_path / "imported.pt", "it has no args")


Change = Callable[[Any, dict[str, Tensor]], None]
UNFIT: dict[str, tuple[Change, str]] = {
    "norm of args": (
        lambda args, model: setattr(args, "encoder_norm_ff", "layer"),
        r"encoder_norm_ff is 'layer', but encoder\.layers\.0\.final_layer_norm holds bias, ema_gz",
    ),
    "norm of the state": (
        lambda args, model: model.pop("encoder.layer_norm.running_phi"),
        "encoder_norm_ff is 'power', but encoder.layer_norm holds bias, ema_gz, iters, weight",
    ),
    "buffer that a norm has not": (
        lambda args, model: model.update({"decoder.layer_norm.iters": torch.ones(1)}),
        "decoder_norm_ff is 'layer', but decoder.layer_norm holds bias, iters, weight",
    ),
    "unknown norm": (
        lambda args, model: setattr(args, "decoder_norm_self", "group"),
        "decoder_norm_self is 'group'; the normalizations .* imported: layer, batch, power",
    ),
    "norm at an unknown place": (
        lambda args, model: model.update({"encoder.layers.0.new_layer_norm.weight": torch.ones(8)}),
        r"the authors' model has no normalization encoder\.layers\.0\.new_layer_norm",
    ),
    "no norm args": (
        lambda args, model: delattr(args, "decoder_norm_ff"),
        "its arguments lack decoder_norm_ff",
    ),
    "no warm-up": (
        lambda args, model: delattr(args, "warmup_updates"),
        "its arguments lack warmup_updates",
    ),
    "warm-up": (
        lambda args, model: setattr(args, "warmup_updates", -4),
        "warmup_steps",
    ),
    "too many layers": (
        lambda args, model: setattr(args, "encoder_layers", 1),
        r"Unexpected key.*encoder\.layers\.1",
    ),
    "too few layers": (
        lambda args, model: setattr(args, "decoder_layers", 3),
        r"Missing key.*decoder\.layers\.2",
    ),
    "missing weight": (
        lambda args, model: model.pop("decoder.layers.0.fc1.weight"),
        r"Missing key.*decoder\.layers\.0\.fc1\.weight",
    ),
    "foreign weight": (
        lambda args, model: model.update({"encoder.layers.0.fc3.weight": torch.ones(1)}),
        r"Unexpected key.*encoder\.layers\.0\.fc3\.weight",
    ),
    "size of a weight": (
        lambda args, model: model.update({"encoder.layers.0.fc1.bias": torch.ones(5)}),
        r"size mismatch for encoder\.layers\.0\.fc1\.bias",
    ),
    "size of a buffer": (
        lambda args, model: model.update({"encoder.layer_norm.ema_gz": torch.ones(1, 5, 1, 1)}),
        r"size mismatch for encoder\.layer_norm\.e\b",
    ),
    "heads": (
        lambda args, model: setattr(args, "encoder_attention_heads", 3),
        "do not make up a model|num_groups=3",
    ),
    "type": (
        lambda args, model: setattr(args, "dropout", "much"),
        "an argument has a value that fairseq refuses: .*'much'",
    ),
    "no tensor": (
        lambda args, model: model.update({"encoder.version": "3"}),
        "its model does not consist of tensors",
    ),
    "task": (
        lambda args, model: setattr(args, "task", "language_modeling"),
        "its task is language_modeling; only translation",
    ),
    "spectral norm": (
        lambda args, model: setattr(args, "encoder_spec_norm", True),
        "a model with encoder_spec_norm cannot be imported",
    ),
}


@pytest.mark.parametrize(("change", "message"), UNFIT.values(), ids=UNFIT)
def test_what_does_not_fit_is_refused(change: Change, message: str, tmp_path: Path) -> None:
    args = arguments(NORMS)
    theirs = their_state_dict(build_model(args), args)
    change(args, theirs)
    refused(write(tmp_path / "theirs.pt", args, theirs), message)


def test_history_without_updates_is_refused(tmp_path: Path) -> None:
    args = arguments(NORMS)
    theirs = their_state_dict(build_model(args), args)
    source = write(tmp_path / "theirs.pt", args, theirs, optimizer_history=[])
    refused(source, "its optimizer_history does not tell the number of updates")


def test_existing_target_is_overwritten_on_demand_only(tmp_path: Path) -> None:
    target = tmp_path / "out.pt"
    target.write_text("precious", encoding="utf-8")
    with pytest.raises(UserError, match=r"out\.pt exists; .*--force"):
        import_checkpoint(GOLDEN / f"{RECORDED[0]}.pt", target)
    assert target.read_text(encoding="utf-8") == "precious"
    import_checkpoint(GOLDEN / f"{RECORDED[0]}.pt", target, force=True)
    assert store.load(target)["model"]


@pytest.mark.parametrize("force", [False, True])
def test_the_source_is_never_overwritten(force: bool, recorded: bytes, tmp_path: Path) -> None:
    (tmp_path / "theirs.pt").write_bytes(recorded)
    (tmp_path / "link.pt").symlink_to(tmp_path / "theirs.pt")
    for target in ("theirs.pt", "link.pt"):
        with pytest.raises(UserError, match="is the file to import"):
            import_checkpoint(tmp_path / "theirs.pt", tmp_path / target, force=force)
    assert (tmp_path / "theirs.pt").read_bytes() == recorded


@contextmanager
def small_files_only() -> Iterator[None]:
    """Within this context no file grows beyond 100 kB, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_targets_that_cannot_be_written(tmp_path: Path) -> None:
    source, target = GOLDEN / f"{RECORDED[0]}.pt", tmp_path / "out.pt"
    with pytest.raises(UserError, match="is a folder; name the file"):
        import_checkpoint(source, tmp_path)
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        import_checkpoint(source, tmp_path / "nowhere" / "out.pt")
    target.write_text("precious", encoding="utf-8")
    with small_files_only(), pytest.raises(UserError, match=r"cannot write .*out\.pt: "):
        import_checkpoint(source, target, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out.pt"]
    assert target.read_text(encoding="utf-8") == "precious"


def test_script_prints_one_block_or_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(GOLDEN / f"{RECORDED[1]}.pt"), "out.pt"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.startswith("imported ") and printed.count("\n") < 10
    assert "batch_released (eps=1e-05, momentum=0.05) at encoder_attention, enc" in printed
    assert store.load(tmp_path / "out.pt")["model"]

    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "nowhere.pt", "other.pt"])
    with pytest.raises(SystemExit, match=r"^error: there is no checkpoint nowhere\.pt$"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert capsys.readouterr().out == ""

    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "nowhere.pt", "out.pt", "--force"])
    with pytest.raises(SystemExit, match=r"there is no checkpoint nowhere\.pt$"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
