"""The models have the sizes that docs/language_models.md states."""

import re
from pathlib import Path

import pytest
from fairseq import models, tasks
from fairseq.data import Dictionary
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from normexp.config.fairseq_config import trainer_config, typed_config
from normexp.config.settings import parse

REPOSITORY = Path(__file__).resolve().parents[2]
GUIDE = (REPOSITORY / "docs" / "language_models.md").read_text(encoding="utf-8")
STATED = re.findall(r"^\| `(\+experiment=[^`]+)` \| ([\d,]+) \|$", GUIDE, re.MULTILINE)
TYPES = {"ptb": 10_008, "wikitext103": 267_744}


def _count(command: str) -> int:
    """Count the parameters of a configuration with as many words as its corpus has."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(REPOSITORY / "configs"), version_base="1.3"):
        settings = parse(compose("train", command.split()))
    dictionary = Dictionary()
    for number in range(TYPES[settings.task.corpus] - len(dictionary)):
        dictionary.add_symbol(f"word{number}")
    assert len(dictionary) == TYPES[settings.task.corpus]
    fairseq_cfg = trainer_config(typed_config(settings), Path("unused"), None, Path("unused"))
    task = tasks.TASK_REGISTRY["language_modeling"](fairseq_cfg.task, dictionary, dictionary)
    model = models.build_model(fairseq_cfg.model, task)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("command", "stated"), STATED)
def test_stated_sizes_are_those_of_the_models(command: str, stated: str) -> None:
    assert _count(command) == int(stated.replace(",", ""))


def test_controls_have_as_many_parameters_as_the_baselines() -> None:
    assert len(STATED) == 8
    counts = {
        command.split("=")[1]: int(stated.replace(",", ""))
        for command, stated in STATED
        if " " not in command
    }
    for baseline, control in (
        ("table2_ptb_tensorized", "table2_ptb"),
        ("table2_wikitext103_tensorized", "table2_wikitext103"),
        ("ptb_future", "ptb_future_control"),
    ):
        assert counts[control] == pytest.approx(counts[baseline], rel=1e-3)
