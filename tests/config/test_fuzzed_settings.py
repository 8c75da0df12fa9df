"""Whatever stands in the settings, checking them succeeds or ends in one line of error.

Hypothesis draws keys, those of fairseq's dataclasses among them, and values of all types.
`thorough` draws more.
"""

from typing import Any

import pytest
from fairseq.dataclass.configs import FairseqConfig
from hypothesis import strategies as st
from omegaconf import OmegaConf
from support.damage import ODD, changed, damaged_values, fuzzed, paths
from support.small_runs import composed

from normexp.config.identity import config_hash
from normexp.config.settings import parse
from normexp.config.validation import validate


def check(content: Any) -> None:
    """Parse and validate what Hydra can make of the content; else nothing is to be checked."""
    try:
        made = OmegaConf.create(content)
    except Exception:
        return
    if isinstance(content, dict):
        settings = parse(made)
        config_hash(settings)
        validate(settings)


@pytest.fixture(params=[40, pytest.param(400, marks=pytest.mark.thorough)], ids=["few", "many"])
def examples(request) -> int:
    return request.param


@pytest.mark.parametrize("task", ["toy_language_model", "toy_translation"])
def test_settings_of_a_run(task: str, examples: int) -> None:
    whole = composed(f"task={task}", "norm=power").model_dump(mode="json")
    check(whole)
    fuzzed(damaged_values(whole), check, examples)


def test_every_group_of_fairseq(examples: int) -> None:
    whole = composed("task=toy_language_model", "norm=power").model_dump(mode="json")
    known = {
        ("fairseq", group, name)
        for group, field in FairseqConfig.__dataclass_fields__.items()
        for name in getattr(field.type, "__dataclass_fields__", {})
    }
    keys = sorted(known | {path for path in paths(whole) if len(path) > 2})
    for group in {key[1] for key in keys if key[0] == "fairseq"}:
        whole["fairseq"].setdefault(group, {})
    fuzzed(
        st.builds(changed, st.just(whole), st.sampled_from(keys), st.sampled_from(ODD)),
        check,
        examples,
    )
