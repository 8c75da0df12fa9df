"""Run folders in every sorry state: the same command goes on, or says in a line what to do."""

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.small_runs import composed

from normexp import pipeline
from normexp.checkpoints import store
from normexp.errors import UserError
from normexp.evaluation import scores
from normexp.runs import records
from normexp.runs.folder import open_run

RUN = Path("runs/toy_language_model/PN-V-seed1")


@pytest.fixture
def settings(overrides: Callable[..., list[str]], little_text: Path) -> Callable[..., list[str]]:
    """Overrides of a run over three epochs, of which two are averaged."""

    def build(*more: str) -> list[str]:
        return overrides(
            "toy_language_model",
            f"data.dir={little_text}",
            "norm=power_v",
            "fairseq.model.dropout=0.3",
            "fairseq.optimization.max_epoch=3",
            "fairseq.dataset.max_tokens=600",
            "evaluation.checkpoint=average",
            "evaluation.average_last=2",
            "evaluation.splits=[test]",
            *more,
        )

    return build


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where finished runs lie, by the checkpoint that they evaluate; filled by the first test."""
    return {}


def remove_record(results: Path) -> None:
    """Among the results; with it the run would count as done whatever its folder holds."""
    shutil.rmtree(results / "records")


@pytest.fixture
def finished_run(settings, finished, tmp_path, tmp_path_factory) -> Callable[..., list[str]]:
    """finished_run(checkpoint): a copy of a finished run; what gives the same command again."""

    def copy(checkpoint: str = "average") -> list[str]:
        command = settings(f"evaluation.checkpoint={checkpoint}")
        if checkpoint not in finished:
            finished[checkpoint] = tmp_path_factory.mktemp(checkpoint) / "results"
            pipeline.run(composed(*command, f"results_dir={finished[checkpoint]}"))
        shutil.copytree(finished[checkpoint], tmp_path / "results")
        return command

    return copy


def write(name: str, content: bytes = b"") -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    return do


def halve(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def flip(name: str) -> Callable[[Path], None]:
    """One bit of a tensor."""

    def do(folder: Path) -> None:
        path = folder / "checkpoints" / name
        weight = next(iter(store.load(path)["model"].values()))
        content = path.read_bytes()
        at = content.index(bytes(weight.flatten().view(torch.uint8).tolist()))
        path.write_bytes(content[:at] + bytes([content[at] ^ 8]) + content[at + 1 :])

    return do


def remove(*names: str) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return do


def folder_at(name: str) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return do


def old_record(folder: Path) -> None:
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps(record | {"schema_version": 0}))


def garbage_in_metrics(folder: Path) -> None:
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines.insert(len(lines) // 2, b"\0\0\0 not a line\n")
    (folder / "metrics.jsonl").write_bytes(b"".join(lines))


def only(*names: str) -> Callable[[Path], None]:
    """Nothing but these files, emptied: what a kill at the beginning leaves."""

    def do(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(b"")

    return do


UNFINISHED = remove("record.json", "training_finished.json")
UNEVALUATED = remove("record.json")

GOES_ON = {
    "empty folder": [only()],
    "only a lock": [only(".lock")],
    "half a configuration": [only(".lock", "config.yaml.part")],
    "no folder for W&B": [UNFINISHED, lambda folder: shutil.rmtree(folder / "wandb", True)],
    "record cut off": [halve("record.json")],
    "record empty": [write("record.json")],
    "record of another schema": [old_record],
    "end of training cut off": [UNEVALUATED, halve("training_finished.json")],
    "end of training of another version": [
        UNEVALUATED,
        write("training_finished.json", b'{"updates": 3}'),
    ],
    "garbage in the metrics": [UNEVALUATED, garbage_in_metrics],
    "garbage in the metrics, unfinished": [UNFINISHED, garbage_in_metrics],
    "metrics cut off": [UNEVALUATED, lambda f: os.truncate(f / "metrics.jsonl", 5000)],
    "no log": [UNEVALUATED, remove("log.txt")],
    "half a checkpoint": [UNFINISHED, write("checkpoints/checkpoint_last.pt.part", b"PK")],
    "last truncated": [UNFINISHED, halve("checkpoints/checkpoint_last.pt")],
    "last empty": [UNFINISHED, write("checkpoints/checkpoint_last.pt")],
    "last flipped": [UNFINISHED, flip("checkpoint_last.pt")],
    "last and third flipped": [UNFINISHED, flip("checkpoint_last.pt"), flip("checkpoint3.pt")],
    "last and best truncated": [
        UNFINISHED,
        halve("checkpoints/checkpoint_last.pt"),
        halve("checkpoints/checkpoint_best.pt"),
    ],
    "third flipped": [UNEVALUATED, flip("checkpoint3.pt")],
    "third missing, unfinished": [UNFINISHED, remove("checkpoints/checkpoint3.pt")],
    "average truncated": [UNEVALUATED, halve("checkpoints/average.pt")],
}


@pytest.mark.parametrize("state", GOES_ON)
def test_same_command_goes_on(state, finished_run, finished, tmp_path, capsys) -> None:
    command = finished_run()
    folder = tmp_path / "results" / RUN
    remove_record(tmp_path / "results")
    for damage in GOES_ON[state]:
        damage(folder)
    record = pipeline.run(composed(*command))
    expected = records.read_record(finished["average"] / RUN / "record.json")
    assert record.metrics == expected.metrics
    assert (record.num_updates, record.num_epochs, record.kernels) == (
        expected.num_updates,
        expected.num_epochs,
        expected.kernels,
    )
    for name in ("average.pt", "checkpoint3.pt", "checkpoint_last.pt"):
        there, here = (
            store.load(root / RUN / "checkpoints" / name)
            for root in (finished["average"], tmp_path / "results")
        )
        for key, weight in there["model"].items():
            assert torch.equal(weight, here["model"][key]), (name, key)
    assert records.load_records(tmp_path / "results").values()
    if "flipped" in state:
        assert "is damaged" in capsys.readouterr().err


def all_empty(folder: Path) -> None:
    for path in (folder / "checkpoints").iterdir():
        path.write_bytes(b"")


REFUSED = {
    "configuration empty": ([write("config.yaml")], "config.yaml is not the configuration"),
    "configuration cut off": (
        [write("config.yaml", b"task: {name: toy\n  kind")],
        r"config.yaml is damaged .*remove the folder",
    ),
    "a file for the checkpoints' folder": (
        [UNFINISHED, remove("checkpoints"), write("checkpoints")],
        "checkpoints is in the way .*remove or rename it",
    ),
    "a folder for the log": ([UNEVALUATED, folder_at("log.txt")], "log.txt is in the way"),
    "a folder for the metrics": (
        [UNFINISHED, folder_at("metrics.jsonl")],
        "metrics.jsonl is in the way",
    ),
    "a folder for the record": ([folder_at("record.json")], "record.json is in the way"),
    "checkpoints gone": (
        [UNEVALUATED, remove("checkpoints")],
        "there is no checkpoint .*remove .* to train anew",
    ),
    "no checkpoint can be read": ([UNFINISHED, all_empty], "damaged .*remove .* to train anew"),
    "no way back to the second": (
        [UNEVALUATED, remove("checkpoints/checkpoint2.pt")],
        r"checkpoint2\.pt is missing; no earlier one is left: remove .* to train anew",
    ),
}


@pytest.mark.parametrize("state", REFUSED)
def test_one_line_names_the_cure(state, finished_run, tmp_path) -> None:
    command = finished_run()
    damages, message = REFUSED[state]
    remove_record(tmp_path / "results")
    for damage in damages:
        damage(tmp_path / "results" / RUN)
    with pytest.raises(UserError, match=message) as raised:
        pipeline.run(composed(*command))
    assert "\n" not in str(raised.value)


def test_translations_in_the_way_of_a_file(overrides, little_text, tmp_path) -> None:
    command = overrides(
        "toy_translation",
        f"data.dir={little_text}",
        "fairseq.dataset.max_tokens=2000",
        "fairseq.optimization.max_epoch=1",
        "evaluation.splits=[valid]",
    )
    hypotheses = tmp_path / "results/runs/toy_translation/LN-seed1/hypotheses"
    with open_run(composed(*command)):
        hypotheses.write_text("")
    with pytest.raises(UserError, match="hypotheses is in the way"):
        pipeline.run(composed(*command))
    hypotheses.unlink()
    assert pipeline.run(composed(*command)).status == "complete"


@pytest.mark.parametrize("state", ["best flipped", "best missing", "best lost for good"])
def test_best_checkpoint(state, finished_run, finished, tmp_path) -> None:
    command = finished_run("best")
    folder = tmp_path / "results" / RUN
    last = store.load(folder / "checkpoints" / store.LAST)
    assert last["extra_state"]["val_loss"] == last["extra_state"]["best"]
    remove_record(tmp_path / "results")
    UNEVALUATED(folder)
    if state == "best missing":
        remove("checkpoints/checkpoint_best.pt")(folder)
    else:
        flip("checkpoint_best.pt")(folder)
    if state != "best lost for good":
        record = pipeline.run(composed(*command))
        expected = records.read_record(finished["best"] / RUN / "record.json")
        assert record.metrics == expected.metrics
        return
    last["extra_state"]["best"] -= 1  # as if an earlier epoch had been better
    store.save(folder / "checkpoints" / store.LAST, last)
    with pytest.raises(UserError, match="no earlier one is left: remove"):
        pipeline.run(composed(*command))


def test_removed_copy_of_the_record_is_written_again(finished_run, tmp_path) -> None:
    command = finished_run()
    (copy,) = (tmp_path / "results/records").rglob("*.json")
    record = records.read_record(copy)
    copy.unlink()
    pipeline.run(composed(*command))
    assert records.read_record(copy) == record


def test_killed_between_its_two_records(finished_run, finished, tmp_path) -> None:
    """The one among the results is there, that of the folder is not."""
    command = finished_run()
    UNEVALUATED(tmp_path / "results" / RUN)
    pipeline.run(composed(*command))
    expected, made = (
        records.read_record(root / RUN / "record.json")
        for root in (finished["average"], tmp_path / "results")
    )
    assert made.metrics == expected.metrics


def no_memory(error: Exception, at: int) -> Callable:
    calls = iter(range(1, 10**6))

    def step(*args, original, **kwargs):
        if next(calls) == at:
            raise error
        return original(*args, **kwargs)

    return step


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        MemoryError(),
    ],
    ids=["GPU", "CPU", "Python"],
)
def test_too_little_memory(error, settings, finished_run, finished, tmp_path, monkeypatch) -> None:
    """Nothing is left out of the training, the record says what to lower, and more memory helps."""
    from fairseq.tasks.language_modeling import LanguageModelingTask

    finished_run()
    shutil.rmtree(tmp_path / "results")
    command = settings()
    original = LanguageModelingTask.train_step
    fails = no_memory(error, at=12)
    with monkeypatch.context() as patch:
        patch.setattr(
            LanguageModelingTask,
            "train_step",
            lambda *args, **kwargs: fails(*args, original=original, **kwargs),
        )
        with pytest.raises(UserError, match="out of memory while training") as raised:
            pipeline.run(composed(*command))
    assert "fairseq.dataset.max_tokens=300 (now 600)" in str(raised.value)
    assert "fairseq.optimization.update_freq=[2]" in str(raised.value)
    (record,) = records.load_records(tmp_path / "results").values()
    assert record.status == "failed" and record.reason == str(raised.value)
    checkpoint = store.load(tmp_path / "results" / RUN / "checkpoints" / store.LAST)
    assert checkpoint["optimizer_history"][-1]["num_updates"] > 1
    again = pipeline.run(composed(*command))
    expected = records.read_record(finished["average"] / RUN / "record.json")
    assert again.status == "complete" and again.metrics == expected.metrics


def test_too_little_memory_to_evaluate(finished_run, tmp_path, monkeypatch) -> None:
    command = finished_run()
    remove_record(tmp_path / "results")
    UNEVALUATED(tmp_path / "results" / RUN)

    def score(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(scores, "score", score)
        with pytest.raises(UserError, match=r"while evaluating.*evaluation.max_tokens below 16000"):
            pipeline.run(composed(*command))
    assert pipeline.run(composed(*command)).status == "complete"


def test_limit_on_the_size_of_files(settings, tmp_path) -> None:
    """`ulimit -f` stops a checkpoint half-way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(UserError, match="ulimit -f"):
            pipeline.run(composed(*settings()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "results" / RUN).rglob("*.part"))
    assert pipeline.run(composed(*settings())).status == "complete"
