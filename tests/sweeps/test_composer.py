"""Runs of a sweep share what is composed, and each is as if it had been composed alone."""

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.errors import HydraException
from omegaconf import OmegaConf
from support.small_runs import composed, run_script

from normexp.config.settings import without_hydra
from normexp.runs.folder import RunFolder
from normexp.runs.saved_settings import read_resolved
from normexp.sweeps import run_status
from normexp.sweeps import sweep as sweeps
from normexp.sweeps.composer import SweepComposer
from normexp.sweeps.sweep import runs_found, runs_of_sweep

RUNS = [
    [],
    ["norm=power", "seed=2"],
    ["seed=3", "norm=power", "seed=4"],
    ["task=ptb", "norm=power_released", "+norm.options.momentum=0.5", "label=mine"],
    ["task=ptb", "~fairseq.dataset.num_workers", "model=lm_tiny"],
    ["+experiment=table1_iwslt14", "norm.options={eps: 0.5}", "tracking=disabled"],
    ["norm.sites.decoder_ffn={name: rms, eps: 0.1}", "results_dir=${data.dir}/x"],
    ["hydra.job.name=x", "++fairseq.common.new=[1,2]", "label='${norm.label}-${seed}'"],
    ["fairseq.optimization.lr=[0.1]", "+tracking.tags=[a]"],
]


@pytest.fixture
def compositions(monkeypatch) -> list[tuple]:
    """The overrides of each whole composition."""
    made = []
    original = ConfigLoaderImpl.load_configuration

    def counted(self, config_name: str, overrides: list[str], **settings) -> object:
        made.append(tuple(overrides))
        return original(self, config_name, overrides, **settings)

    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", counted)
    return made


def test_each_run_is_as_composed_alone() -> None:
    composer = SweepComposer()
    for overrides in [*RUNS, *RUNS]:
        alone = composer.composed(overrides)
        cfg, choices = composer.run(overrides)
        assert choices == alone.hydra.runtime.choices
        ours, theirs = (OmegaConf.to_yaml(one) for one in (cfg, without_hydra(alone)))
        assert ours == theirs
        assert OmegaConf.is_struct(cfg) and OmegaConf.is_struct(alone)


@pytest.mark.parametrize(
    "overrides",
    [
        ["norm=powr"],
        ["fairseq.optimisation.lr=3"],
        ["+seed=3"],
        ["~seed=3"],
        ["norm=power", "norm@x.y=power"],
        ["seed=1,2"],
    ],
)
def test_errors_are_hydras(overrides: list[str]) -> None:
    composer = SweepComposer()
    composer.run(["seed=3"])
    with pytest.raises(HydraException) as alone:
        composer.composed(overrides)
    with pytest.raises(type(alone.value)) as shared:
        composer.run(overrides)
    assert str(shared.value) == str(alone.value)


def test_groups_of_another_search_path(tmp_path) -> None:
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra" / "one.yaml").write_text("# @package _global_\nbudget: from extra\n")
    cfg, choices = SweepComposer().run([f"hydra.searchpath=[file://{tmp_path}]", "+extra=one"])
    assert choices["extra"] == "one" and cfg.budget == "from extra" and "extra" not in cfg


def test_choices_of_groups_are_composed_once(compositions) -> None:
    """The sweep, each norm, and each norm without overrides: not each run."""
    overrides = ["norm=layer,power", "seed=range(1,6)", "fairseq.optimization.lr=[0.1],[0.0005]"]
    runs = runs_of_sweep(overrides)
    assert len(runs) == 20 and len(compositions) == 5
    for run in (runs[0], runs[7], runs[19]):
        learning_rate = run.fairseq["optimization"]["lr"]
        alone = [f"norm={run.norm.name}", f"seed={run.seed}"]
        assert run == composed(*alone, f"fairseq.optimization.lr={learning_rate}")
    assert runs[7].label != runs[19].label


def test_a_status_reads_each_configuration_once(tmp_path, monkeypatch) -> None:
    read = []

    def counted(path) -> object:
        read.append(path)
        return read_resolved(path)

    monkeypatch.setattr("normexp.runs.folder.read_resolved", counted)
    for seed in (1, 2):
        settings = composed(f"results_dir={tmp_path}", f"seed={seed}")
        folder = RunFolder(settings.run_dir)
        folder.path.mkdir(parents=True)
        folder.config.write_text(settings.as_yaml(), encoding="utf-8")
    found = runs_found(tmp_path)
    states = [run_status.status_of(run, {}, from_folder=True).state for run in found]
    assert states == ["interrupted"] * 2 and len(read) == 2
    listed = run_script("sweep_status.py", f"results_dir={tmp_path}")
    named = run_script("sweep_status.py", f"results_dir={tmp_path}", "seed=1,2")
    assert listed.stdout == named.stdout and "2 interrupted" in listed.stdout


def test_the_sweep_of_an_experiment_is_read_from_hydras_part() -> None:
    assert sweeps.SweepComposer().composed(["+experiment=table1_iwslt14"]).hydra.sweeper.params
