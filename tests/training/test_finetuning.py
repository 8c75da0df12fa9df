"""Runs that begin with the weights of another checkpoint."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.small_runs import composed

from normexp import pipeline
from normexp.checkpoints import store
from normexp.config.identity import config_hash
from normexp.config.settings import RunSettings
from normexp.errors import UserError
from normexp.runs.folder import RunFolder
from normexp.runs.records import record_path

Chosen = Callable[..., RunSettings]
KEY = "+fairseq.checkpoint.finetune_from_model"


@pytest.fixture
def chosen(overrides, little_text: Path) -> Chosen:
    """Settings of a run of a few updates, in PN's warm-up until the third."""

    def build(*more: str) -> RunSettings:
        return composed(
            *overrides("toy_language_model", f"data.dir={little_text}", "norm=power"),
            "fairseq.optimization.max_epoch=0",
            "fairseq.optimization.max_update=6",
            "fairseq.dataset.max_tokens=700",  # 7 updates are an epoch
            "norm.options.warmup_steps=3",
            "evaluation.splits=[valid]",
            *more,
        )

    return build


@pytest.fixture
def donors(chosen: Chosen, tmp_path: Path) -> Path:
    """A folder with two checkpoints of one model: "wanted.pt", and another that fairseq resumes."""
    settings = chosen("label=donor", "fairseq.optimization.max_update=2")
    pipeline.run(settings)
    state = store.load(RunFolder(settings.run_dir).checkpoints / store.LAST)
    folder = tmp_path / "donors"
    folder.mkdir()
    for name, mark in (("wanted.pt", 7.0), (store.LAST, 3.0)):
        embedding(state["model"])[5, 0] = mark
        store.save(folder / name, state)
    return folder


def embedding(model: dict[str, torch.Tensor]) -> torch.Tensor:
    return model["decoder.embed_tokens.weight"]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_begins_with_exactly_the_checkpoint_that_is_named(
    chosen: Chosen, donors: Path
) -> None:
    before = content(donors)
    settings = chosen(
        *("label=tuned", f"{KEY}={donors / 'wanted.pt'}", "fairseq.optimization.max_update=1"),
        *("fairseq.optimization.lr=[1e-9]", "~fairseq.lr_scheduler.total_num_update"),
        "fairseq.lr_scheduler._name=fixed",
    )
    record = pipeline.run(settings)
    last = store.load(RunFolder(settings.run_dir).checkpoints / store.LAST)
    donor = store.load(donors / "wanted.pt")
    for name, value in donor["model"].items():
        now = last["model"][name]
        if name.endswith(".step"):  # the norms go on counting where the donor was
            assert (int(value), int(now)) == (2, 3)
        elif not name.endswith(("psi2", "nu")):
            torch.testing.assert_close(now, value, rtol=0, atol=1e-6)
    # The rest begins anew.
    assert [entry["num_updates"] for entry in last["optimizer_history"]] == [1]
    assert (record.num_updates, record.num_epochs) == (1, 1)
    assert last["extra_state"]["previous_training_time"] < 60
    assert last["cfg"]["checkpoint"]["finetune_from_model"] is None
    assert content(donors) == before


def test_an_interrupted_run_goes_on_from_its_own_checkpoint(
    chosen: Chosen, donors: Path, tmp_path: Path
) -> None:
    settings = chosen(
        *("label=tuned", f"{KEY}={donors / 'wanted.pt'}"),
        "+fairseq.checkpoint.save_interval_updates=3",
    )
    record = pipeline.run(settings)
    folder = RunFolder(settings.run_dir)
    without_break = store.load(folder.checkpoints / store.LAST)["model"]
    # As if killed after the third update, twice: once with and once without checkpoint_last.pt.
    for lost in (False, True):
        early = folder.checkpoints / "checkpoint_1_3.pt"
        for path in (folder.finished, folder.record, record_path(settings.results_dir, record)):
            path.unlink()
        for path in folder.checkpoints.iterdir():
            if path != early:
                path.unlink()
        if not lost:
            shutil.copy(early, folder.checkpoints / store.LAST)
        again = pipeline.run(settings)
        assert again.metrics == record.metrics
        after = store.load(folder.checkpoints / store.LAST)["model"]
        assert all(torch.equal(after[name], value) for name, value in without_break.items())


def test_identity_and_record_name_the_content_and_not_the_path(
    chosen: Chosen, donors: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved.pt"
    shutil.copy(donors / "wanted.pt", moved)
    one, same, other, none = (
        chosen(*([f"{KEY}={path}"] if path else []))
        for path in (donors / "wanted.pt", moved, donors / store.LAST, None)
    )
    assert config_hash(one) == config_hash(same)
    assert len({config_hash(settings) for settings in (one, other, none)}) == 3
    assert one.experiment() == same.experiment()
    # A label that the command does not give follows the content, too.
    labels = [
        composed("task=toy_language_model", f"{KEY}={path}").label
        for path in (donors / "wanted.pt", moved, donors / store.LAST)
    ]
    assert labels[0] == labels[1] != labels[2]
    assert one.departures == same.departures
    assert str(tmp_path) not in str(one.experiment()["fairseq"])
    # A run folder's settings keep the name when the file has gone.
    moved.unlink()
    again = same.with_overrides(["evaluation.beam=3"])
    assert again.finetuned_from == one.finetuned_from


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["norm.sites.decoder_ffn=layer"], "norm 'power' at decoder_ffn, this run 'layer'"),
        (["fairseq.model.decoder_ffn_embed_dim=24"], "another model .*size mismatch for decoder"),
        (["fairseq.model.decoder_layers=2"], r"another model .*Missing key\(s\).*layers.1"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_before_training(
    more: list[str], message: str, chosen: Chosen, donors: Path
) -> None:
    path = donors / "wanted.pt"
    settings = chosen("label=tuned", *more, f"{KEY}={path}")
    with pytest.raises(UserError, match=f"finetune_from_model={path} .*{message}"):
        pipeline.run(settings)
    assert not list(RunFolder(settings.run_dir).checkpoints.glob("*.pt"))


def test_a_file_that_cannot_be_read_is_named(chosen: Chosen, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"finetune_from_model=.*absent\.pt cannot be read: No such"
    ):
        chosen(f"{KEY}={tmp_path / 'absent.pt'}")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        chosen(f"{KEY}={tmp_path}")
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(UserError, match=r"finetune_from_model: the checkpoint .* is damaged"):
        pipeline.run(chosen(f"{KEY}={tmp_path / 'text.pt'}"))
    with pytest.raises(UserError, match="finetuned_from=abc is filled in by normexp"):
        pipeline.run(chosen("+finetuned_from=abc"))


def test_averages_of_gradients_follow_from_the_donors_loss_scale(
    chosen: Chosen, donors: Path
) -> None:
    """A donor trained in float16 has nu in the unit of a loss that was multiplied by a scale."""
    from normexp.training import finetuning

    state = store.load(donors / "wanted.pt")
    nu = {name: value.clone() for name, value in state["model"].items() if name.endswith(".nu")}
    assert nu
    state["last_optimizer_state"]["loss_scale"] = 4.0
    store.save(donors / "half.pt", state)
    loaded = {}
    follow = finetuning.follow_donor

    def spy(model, donor_scale, scale):
        follow(model, donor_scale, scale)
        loaded.update({name: value.clone() for name, value in model.state_dict().items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetuning, "follow_donor", spy)
        pipeline.run(chosen("label=half", f"{KEY}={donors / 'half.pt'}"))
    for name, value in nu.items():
        torch.testing.assert_close(loaded[name], value / 4, rtol=1e-6, atol=0)
