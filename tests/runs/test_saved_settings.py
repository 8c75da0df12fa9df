"""A run's configuration is read without OmegaConf where that gives the same settings."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from support.damage import damaged_bytes, fuzzed
from support.small_runs import composed

from normexp.config.settings import RunSettings, parse
from normexp.errors import UserError
from normexp.runs import folder as run_folder
from normexp.runs.folder import RunFolder
from normexp.runs.saved_settings import read_resolved

RUNS = {
    "translation": [
        "task=toy_translation",
        "norm=power",
        "label='0.5'",
        "norm.sites.decoder_ffn=rms",
    ],
    "language model": ["task=ptb", "norm=power_released", "fairseq.optimizer.adam_eps=1e-9"],
    "a list": ["task=iwslt14", "fairseq.optimization.lr=[0.1,1e-05]", "tracking.tags=[a b,'1']"],
}


def by_omegaconf(path: Path) -> RunSettings:
    return parse(OmegaConf.load(path))


@pytest.mark.parametrize("run", RUNS)
def test_a_run_folder_is_read_without_omegaconf(run: str, tmp_path, monkeypatch) -> None:
    settings = composed(*RUNS[run])
    folder = RunFolder(tmp_path)
    folder.config.write_text(settings.as_yaml(), encoding="utf-8")
    assert by_omegaconf(folder.config) == settings
    monkeypatch.setattr(run_folder.OmegaConf, "load", lambda _: pytest.fail("read by OmegaConf"))
    assert folder.read_settings() == settings


@pytest.mark.parametrize(
    ("changed", "to"),
    [
        ("label: LN", "label: ${norm.label}"),
        ("budget: null", "budget: ???"),
        ("seed: 1", "seed: !!int '1'"),
        ("seed: 1", "seed: &one 1"),
    ],
)
def test_omegaconf_reads_what_is_not_plain(changed: str, to: str, tmp_path) -> None:
    path = tmp_path / "config.yaml"
    text = composed("tracking=disabled", "budget=null").as_yaml()
    assert changed in text
    path.write_text(text.replace(changed, to), encoding="utf-8")
    assert read_resolved(path) is None


def test_damaged_files_are_read_alike(tmp_path) -> None:
    """Whatever is accepted has the settings that OmegaConf finds."""
    path = tmp_path / "config.yaml"
    whole = composed("task=toy_translation", "tracking=disabled")
    accepted = []

    def read(damage: bytes) -> None:
        path.write_bytes(damage)
        if settings := read_resolved(path):
            accepted.append(settings)
            assert json.dumps(settings.model_dump(mode="json")) == json.dumps(
                by_omegaconf(path).model_dump(mode="json")
            )

    fuzzed(damaged_bytes(whole.model_dump(mode="json"), whole.as_yaml().encode()), read, 200)
    assert 10 < len(accepted) < 190


def test_a_model_that_does_not_fit_its_task_is_refused(tmp_path) -> None:
    path = tmp_path / "config.yaml"
    text = composed("task=toy_translation").as_yaml()
    path.write_text(text.replace("_name: normexp_transformer\n", "_name: normexp_transformer_lm\n"))
    assert read_resolved(path) is None
    with pytest.raises(UserError, match="needs a model of the type normexp_transformer"):
        by_omegaconf(path)
