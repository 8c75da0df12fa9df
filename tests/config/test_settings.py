"""Settings: what Hydra's configuration may hold, and what is said of anything else."""

import pytest
from support.small_runs import composed

from normexp.config.validation import validate
from normexp.errors import UserError


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation=5", "evaluation=5 must be a group with the keys checkpoint, average_last"),
        ("speed=null", "speed=None must be a group with the keys precision"),
        ("norm.options=null", r"norm.options=None must be a mapping such as \{\}"),
        ("evaluation.splits=[]", r"evaluation.splits=\[\]; known: valid, test"),
        ("evaluation.stride=1.5", "evaluation.stride=1.5 must be an integer or null"),
        ("+evaluation.bem=3", "evaluation.bem is unknown; known: checkpoint, average_last, beam"),
        ("~evaluation.beam", "evaluation.beam is missing"),
        ("results_dir=''", "results_dir='' must be a path"),
        ("~fairseq.criterion", "fairseq.criterion=None must be a group"),
        ("fairseq.common=3", "fairseq.common=3 must be a group"),
        ("fairseq.optimization.max_epoch=abc", "fairseq.*abc"),
        ("+fairseq.foo=1", "foo"),
    ],
)
def test_the_full_key_its_value_and_what_it_may_be_are_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(composed(override))


def test_what_yaml_makes_of_names_is_accepted() -> None:
    settings = composed("task.name=2024", "label=0.95", "tracking.tags=[1,a]", "tracking.project=7")
    assert (settings.task.name, settings.label) == ("2024", "0.95")
    assert (settings.tracking.group, settings.tracking.project) == ("2024", "7")
    assert settings.tracking.tags == ["1", "a"]


def test_no_folder_of_archives_is_not_the_current_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMEXP_LOCAL_DATA", "")
    assert composed().data.local is None


def test_limits_may_be_text_or_null() -> None:
    validate(composed("fairseq.optimization.max_update='3'"))
    with pytest.raises(UserError, match="would never end"):
        validate(composed("fairseq.optimization.max_update=0"))


def test_checks_leave_the_settings_as_they_are() -> None:
    settings = composed("norm=power", "speed.precision=bfloat16")
    before = settings.model_dump()
    validate(settings)
    assert settings.model_dump() == before
