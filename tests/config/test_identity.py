"""A run's identity: what changes it, what does not, and that committed records keep theirs."""

import json
from functools import reduce
from pathlib import Path

import pytest
from pydantic import Field
from support.small_runs import REPOSITORY, composed

from normexp.config.identity import (
    PENALIZED,
    config_hash,
    differences,
    hash_config,
    identity,
    is_same_training,
)
from normexp.config.settings import (
    EvaluationSettings,
    ExperimentSettings,
    RunSettings,
    SpeedSettings,
    validated,
)
from normexp.runs.records import read_record, write_record

RECORDS = sorted((REPOSITORY / "results" / "records").glob("*/*.json"))


def changed(settings: RunSettings, key: str, value: object) -> RunSettings:
    """The settings with another value at a dotted key."""
    content = settings.model_dump(mode="json")
    *parents, last = key.split(".")
    reduce(lambda node, name: node.setdefault(name, {}), parents, content)[last] = value
    return validated(RunSettings, content)


def recorded(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


class LaterEvaluation(EvaluationSettings):
    """As a later version might have it: with a setting whose default is how runs went before."""

    temperature: float = 1.0


class LaterSpeed(SpeedSettings):
    fused_attention: bool = False


class Later(ExperimentSettings):
    """Settings and a whole group that came later."""

    evaluation: LaterEvaluation
    speed: LaterSpeed = LaterSpeed()
    averaging: SpeedSettings = Field(default_factory=SpeedSettings)


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_new_setting_leaves_every_recorded_hash_as_it_is(path: Path) -> None:
    record = recorded(path)
    assert config_hash(validated(ExperimentSettings, record["config"])) == record["config_hash"]
    # read by the later version, and as the later version would write it
    later = validated(Later, record["config"])
    assert config_hash(later) == record["config_hash"]
    written = later.experiment()
    assert written["evaluation"]["temperature"] == 1.0 and "averaging" in written
    assert config_hash(validated(Later, written)) == record["config_hash"]
    # but another value than before is another run
    written["evaluation"]["temperature"] = 0.5
    assert config_hash(validated(Later, written)) != record["config_hash"]


def test_a_record_of_an_earlier_rule_is_the_same_run(tmp_path: Path) -> None:
    record = next(r for r in map(recorded, RECORDS) if "speed" in r["config"])
    earlier = hash_config(record["config"], without=["seed"])
    assert earlier != record["config_hash"]
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record | {"config_hash": earlier}), encoding="utf-8")
    assert read_record(path).config_hash == record["config_hash"]


def test_a_record_keeps_the_hash_of_settings_that_it_cannot_store(
    tmp_path: Path, make_record, monkeypatch
) -> None:
    """Paths and numbers that are not finite are stored as others; the hash is not made of those."""
    monkeypatch.chdir(tmp_path)
    settings = composed(f"+task.vocabulary={tmp_path}/v", "+fairseq.optimization.stop_min_lr=-.inf")
    record = make_record(config=settings.experiment(), config_hash=config_hash(settings))
    write_record(tmp_path / "record.json", record)
    read = read_record(tmp_path / "record.json")
    assert read.config["task"]["vocabulary"] == "./v"
    assert read.config_hash == config_hash(settings)


UNSEPARATED = "seeding=fairseq"  # before seeds were separated
STOCK = [
    *("speed.fast_dropout=false", "speed.fused_loss=false", "speed.fused_adam=false"),
    UNSEPARATED,
]


@pytest.mark.parametrize(
    ("path", "overrides"),
    [
        ("multi30k/LN-seed1", ["task=multi30k", "norm=layer"]),
        ("multi30k/PN-seed1", ["task=multi30k", "norm=power"]),
        ("ptb/BN-seed1", ["task=ptb", "norm=batch", *STOCK]),
        ("ptb/PN-V-seed1", ["task=ptb", "norm=power_v", *STOCK]),
        (
            "ptb_future/PN-bounded-published-seed1",
            [
                *("+experiment=ptb_future", "norm=power_bounded"),
                *("fairseq.model.attention=published", *STOCK),
            ],
        ),
        (
            "precision_toy/PN-bfloat16-seed2",
            [
                *("+experiment=precision_toy", "norm=power", "speed.precision=bfloat16", "seed=2"),
                UNSEPARATED,
            ],
        ),
    ],
)
def test_todays_command_is_the_recorded_run(path: str, overrides: list[str]) -> None:
    record = recorded(REPOSITORY / "results" / "records" / f"{path}.json")
    settings = composed(*overrides, f"label={record['label']}")
    assert differences(validated(ExperimentSettings, record["config"]), settings) == ""
    assert config_hash(settings) == record["config_hash"]
    assert settings.seed == record["seed"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.dir", "elsewhere"),
        ("results_dir", "elsewhere"),
        ("run_dir", "elsewhere"),
        ("tracking.mode", "disabled"),
        ("distributed.statistics", "local"),  # of one rank
        ("norm.options.sync", False),
        ("norm.sites.encoder_ffn", None),
        ("seed", 2),
    ],
)
def test_what_does_not_decide_the_result_is_no_part_of_the_hash(key: str, value: object) -> None:
    settings = composed("norm=power")
    assert config_hash(changed(settings, key, value)) == config_hash(settings)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("label", "PN2"),
        ("norm.options.alpha_fwd", 0.95),
        ("norm.options.bound_nu", True),
        ("norm.sites.encoder_ffn", "layer"),
        ("norm.sites.encoder_ffn", {"name": "power", "sync": False, "eps": 1e-6}),
        ("distributed.ranks", 2),
        ("speed.precision", "bfloat16"),
        ("evaluation.beam", 1),
        ("evaluation.stride", 8),
        ("fairseq.optimization.lr", [1e-3]),
        ("fairseq.common.fp16", True),
        ("fairseq.criterion._name", "normexp_adaptive_loss"),
        ("task.norm_warmup_steps", 7),
    ],
)
def test_what_decides_the_result_changes_the_hash(key: str, value: object) -> None:
    settings = composed("norm=power")
    other = changed(settings, key, value)
    assert config_hash(other) != config_hash(settings)
    assert key.split(".")[0] in differences(settings, other)


def test_sync_decides_on_several_ranks() -> None:
    settings = composed("norm=power", "distributed.ranks=2")
    assert config_hash(changed(settings, "norm.options.sync", False)) != config_hash(settings)


def test_the_identity_is_what_json_keeps() -> None:
    settings = composed("task=ptb", "norm=power")
    assert json.loads(json.dumps(identity(settings))) == identity(settings)


def test_settings_survive_their_yaml(tmp_path: Path) -> None:
    from normexp.runs.folder import RunFolder

    settings = composed(
        f"run_dir={tmp_path}", "data.local=archives", "label=0.95", "tracking=disabled"
    )
    folder = RunFolder(tmp_path)
    folder.config.write_text(settings.as_yaml(), encoding="utf-8")
    assert folder.read_settings() == settings
    assert settings.label == "0.95"


def test_names_of_other_packages_are_repeated_right() -> None:
    """config imports neither torch nor W&B, so it names their choices again."""
    from typing import get_args

    from normexp.config.settings import SpeedSettings, TrackingSettings
    from normexp.norms.kernels.choice import CHOICES
    from normexp.tracking.tracker import MODES

    assert get_args(SpeedSettings.model_fields["kernels"].annotation) == CHOICES
    assert get_args(TrackingSettings.model_fields["mode"].annotation) == MODES


@pytest.mark.parametrize(
    ("key", "one", "other"),
    [
        ("fairseq.dataset.max_tokens_valid", None, "absent"),
        ("fairseq.optimization.clip_norm", 1, 1.0),
        ("task.flag", 1, True),
    ],
)
def test_a_run_and_its_hash_are_told_apart_alike(key: str, one: object, other: object) -> None:
    settings = composed("norm=power")
    first = changed(settings, key, one)
    second = settings if other == "absent" else changed(settings, key, other)
    assert config_hash(first) != config_hash(second) and not is_same_training(first, second)
    assert key in differences(first, second)


@pytest.mark.parametrize("checkpoint", ["best", "ema", "average"])
def test_a_training_serves_every_evaluation_of_it(checkpoint: str) -> None:
    """Only an average needs epochs that may not have been kept."""
    own = composed(f"evaluation.checkpoint={checkpoint}")
    beam = composed(f"evaluation.checkpoint={checkpoint}", "evaluation.beam=2")
    assert is_same_training(own, own) and is_same_training(own, beam)
    of_best = composed("evaluation.checkpoint=best")
    assert is_same_training(of_best, own) == (checkpoint != "average")


def test_a_finished_run_does_not_hide_invalid_settings() -> None:
    """Only values without effect are left out; others reach the checks of a run."""
    settings = composed("norm=power")
    assert config_hash(changed(settings, "norm.options.sync", "maybe")) != config_hash(settings)
    regularized = composed("norm=regularized_batch")
    stock = changed(regularized, "fairseq.criterion._name", "label_smoothed_cross_entropy")
    assert config_hash(stock) != config_hash(regularized)  # it would lack the penalty


def test_penalized_norms_are_those_with_a_penalty() -> None:
    from normexp.norms import available_norms, norm_class

    assert {name for name in available_norms() if hasattr(norm_class(name), "penalty")} == PENALIZED
