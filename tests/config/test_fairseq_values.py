"""Numbers where fairseq wants lists and texts: one run however it is written."""

import dataclasses
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from fairseq.dataclass.configs import OptimizationConfig
from support.small_runs import composed

from normexp.config.fairseq_config import typed_config
from normexp.config.fairseq_values import LISTS
from normexp.config.identity import config_hash
from normexp.errors import UserError

SAME = {
    "fairseq.optimization.lr": ("[0.001]", "0.001", "1e-3"),
    "fairseq.optimization.update_freq": ("[2]", "2"),
    "fairseq.optimizer.adam_betas": (
        '"(0.9, 0.95)"',
        '"(0.9,0.95)"',
        "[0.9,0.95]",
        '"[0.9, 0.95]"',
    ),
}


@pytest.mark.parametrize("key", SAME)
def test_every_way_of_writing_is_the_same_run(key: str) -> None:
    usual, *others = [composed("task=ptb", f"{key}={value}") for value in SAME[key]]
    group, name = key.split(".")[1:]
    expected = typed_config(usual)[group][name]
    for other in others:
        assert config_hash(usual) == config_hash(other)
        assert (usual.label, usual.departures) == (other.label, other.departures)
        assert typed_config(other)[group][name] == expected
    assert config_hash(usual) != config_hash(composed("task=ptb"))


def test_the_usual_value_in_another_form_is_no_departure() -> None:
    usual = composed("task=ptb")
    written = "fairseq.optimization.lr=0.002", "fairseq.optimizer.adam_betas=[0.9,0.98]"
    assert composed("task=ptb", *written).label == usual.label


def test_fairseq_gets_the_number() -> None:
    assert list(typed_config(composed("fairseq.optimization.lr=3")).optimization.lr) == [3.0]
    assert composed("fairseq.optimizer.adam_betas=[0.5,0.75]").fairseq["optimizer"][
        "adam_betas"
    ] == ("(0.5, 0.75)")


@pytest.mark.parametrize(
    "wrong",
    [
        "fairseq.optimization.lr=abc",
        "fairseq.optimization.lr=true",
        "fairseq.optimization.lr=[]",
        "fairseq.optimization.lr=null",
        "fairseq.optimization.update_freq=1.5",
        "fairseq.optimization.update_freq=[2,x]",
        "fairseq.optimizer.adam_betas=0.9",
        "fairseq.optimizer.adam_betas=[0.9]",
        "fairseq.optimizer.adam_betas=abc",
        "fairseq.optimizer.adam_betas=[0.9,0.98,0.5]",
    ],
)
def test_another_value_is_refused_by_its_key(wrong: str) -> None:
    key = wrong.partition("=")[0]
    with pytest.raises(UserError, match=rf"^{key}=.* must be "):
        composed(wrong)


def test_no_list_of_fairseqs_is_forgotten() -> None:
    types: dict[str, Any] = get_type_hints(OptimizationConfig)
    names = [field.name for field in dataclasses.fields(OptimizationConfig)]
    lists = {name: get_args(types[name])[0] for name in names if get_origin(types[name]) is list}
    assert lists == LISTS
