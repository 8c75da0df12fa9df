"""What evaluation and record need is there before the first update, or the run ends at once."""

import dataclasses
import json
import pwd
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.small_runs import composed

from normexp import pipeline
from normexp.errors import UserError
from normexp.evaluation import bleu
from normexp.norms.kernels import native
from normexp.runs.records import Asked
from normexp.training import loop


@pytest.fixture
def refused(overrides, little_text: Path, monkeypatch) -> Callable[..., str]:
    """Return refused(*overrides) -> the error of a run that must not begin to train."""

    def train(*_: object, **__: object) -> None:
        raise AssertionError("the training began")

    def run(*more: str) -> str:
        monkeypatch.setattr(loop, "train", train)
        with pytest.raises(UserError) as error:
            pipeline.run(composed(*overrides("toy_translation", f"data.dir={little_text}", *more)))
        return str(error.value)

    return run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.length_penalty=abc", "must be a number from -10 to 10"),
        ("evaluation.length_penalty=nan", "must be a number from -10 to 10"),
        ("evaluation.length_penalty=1e9", "must be a number from -10 to 10"),
        ("evaluation.beam=1000000000", "must be an integer from 1 to 1000"),
        ("evaluation.beam=900", "evaluation.beam=900 must be less than the [0-9]+ entries"),
        ("evaluation.max_tokens=100000000000000000000", "must be an integer from 1 to 10000000"),
        ("evaluation.average_last=1000000000", "must be an integer from 1 to 10000"),
        ("evaluation.splits=[test,test]", "known: valid, test"),
        (f"label={'x' * 240}", "at most 170 of them"),
        (f"task.name={'x' * 240}", "at most 170 of them"),
    ],
)
def test_settings_that_evaluation_or_the_record_cannot_use(override, message, refused) -> None:
    assert re.search(message, refused(override))


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("fairseq.model.encoder.attention_heads=3", "AssertionError: embed_dim must be divisible"),
        ("fairseq.model.encoder.embed_dim=8", "ValueError: --share-all-embeddings requires"),
    ],
)
def test_settings_that_make_up_no_model(override, reason, overrides, little_text, caplog) -> None:
    """One line of error, no record of a failure; the log has where it came from."""
    settings = composed(*overrides("toy_translation", f"data.dir={little_text}", override))
    with pytest.raises(UserError, match=f"cannot train with these settings: {reason}"):
        pipeline.run(settings)
    assert not (settings.run_dir / "record.json").exists()
    assert "Traceback" in (settings.run_dir / "log.txt").read_text()


def test_a_package_that_is_missing(refused, monkeypatch) -> None:
    def detokenise(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'sacremoses'")

    monkeypatch.setattr(bleu, "detokenise", detokenise)
    assert "No module named 'sacremoses'" in refused()


def test_references_that_were_cut(refused, monkeypatch) -> None:
    from normexp.corpora import PreparedCorpus

    counted = PreparedCorpus.sentences
    monkeypatch.setattr(PreparedCorpus, "sentences", lambda *a: counted(*a) + 1)
    assert "lines for 21 sentences; remove" in refused()


@pytest.mark.parametrize(
    "name",
    [
        "runs/toy_translation/LN-seed1/hypotheses/test.txt/folder",
        "runs/toy_translation/LN-seed1/record.json/folder",
    ],
)
def test_folders_where_results_belong(
    name: str, refused, overrides, little_text, tmp_path: Path
) -> None:
    settings = composed(*overrides("toy_translation", f"data.dir={little_text}"))
    settings.run_dir.mkdir(parents=True)
    (settings.run_dir / "config.yaml").write_text(settings.as_yaml())  # of a killed run
    (tmp_path / "results" / name).mkdir(parents=True)
    message = refused()
    assert str((tmp_path / "results" / name).parent) in message and "in the way" in message


def test_a_record_that_could_not_be_written(refused, monkeypatch) -> None:
    asked = pipeline._asked

    def of_wrong_type(*arguments: object) -> Asked:
        return dataclasses.replace(asked(*arguments), budget=5)

    monkeypatch.setattr(pipeline, "_asked", of_wrong_type)
    assert "the record of this run could not be written: not a valid record: budget" in refused()


def test_a_disk_without_room_for_the_checkpoints(
    overrides, little_text, monkeypatch, tmp_path
) -> None:
    usage = shutil.disk_usage
    small = [*overrides("toy_translation", f"data.dir={little_text}"), "evaluation.splits=[valid]"]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=300_000))
        with pytest.raises(UserError, match=r"no space left on the disk of .* they need .* GB and"):
            pipeline.run(composed(*small))
    assert not list(tmp_path.rglob("checkpoint*.pt"))
    record = pipeline.run(composed(*small))
    written = sum(path.stat().st_size for path in tmp_path.rglob("checkpoint*.pt"))
    assert record.status == "complete" and written > 300_000
    # with as much room as they took there is no complaint
    shutil.rmtree(tmp_path / "results")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=2 * written))
    assert pipeline.run(composed(*small)).status == "complete"


def test_a_user_without_a_home_folder(overrides, little_text, monkeypatch, tmp_path) -> None:
    """As a container has one, by number alone."""

    def missing(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", missing)
    for name in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(native.Unavailable, match="set XDG_CACHE_HOME"):
        native.cache_folder()
    small = overrides("toy_language_model", f"data.dir={little_text}", "evaluation.splits=[valid]")
    assert pipeline.run(composed(*small)).status == "complete"
    (path,) = (tmp_path / "results/records").rglob("*.json")
    assert json.loads(path.read_text())["status"] == "complete"
