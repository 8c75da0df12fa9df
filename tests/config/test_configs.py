"""Every shipped config composes, is valid, and says what the papers' set-ups say."""

from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from support.small_runs import REPOSITORY, composed

from normexp.config.validation import validate
from normexp.errors import UserError
from normexp.norms import available_norms, norm_options
from normexp.runs.folder import open_run

CONFIGS = REPOSITORY / "configs"
FLOAT32 = ["fairseq.common.fp16=false"]


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def on_gpu_or_float32(*overrides: str):
    """The config as it is where there is a GPU; half precision is refused on a CPU."""
    fp16 = [] if torch.cuda.is_available() or "task=wmt14" not in overrides else FLOAT32
    return composed(*overrides, *fp16)


@pytest.mark.parametrize("norm", names("norm"))
@pytest.mark.parametrize("task", names("task"))
def test_every_norm_fits_every_task(task: str, norm: str) -> None:
    settings = on_gpu_or_float32(f"task={task}", f"norm={norm}")
    if norm == "power_released_mt" and settings.task.kind == "language_model":
        with pytest.raises(UserError, match="unknown site 'encoder_final'"):
            validate(settings)
        return
    if norm == "instance" and settings.task.kind == "language_model":
        with pytest.raises(UserError, match="would see the later ones"):
            validate(settings)
        return
    sites = validate(settings).sites
    chosen = settings.norm.name
    if settings.task.kind == "translation":
        assert [sites[site]["name"] for site in sites] == [chosen] * 3 + ["layer"] * 4
    else:
        assert {norm["name"] for norm in sites.values()} == {chosen}
    # the file spells out every option of the layer
    assert set(settings.norm.options) == set(norm_options(chosen))


def test_every_norm_has_a_config() -> None:
    assert {composed(f"norm={norm}").norm.name for norm in names("norm")} == set(available_norms())


@pytest.mark.parametrize("model", names("model"))
def test_every_model_is_valid(model: str) -> None:
    kind = (
        "translation"
        if OmegaConf.load(CONFIGS / "model" / f"{model}.yaml").get("encoder")
        else "lm"
    )
    task = {"translation": "toy_translation", "lm": "toy_language_model"}[kind]
    adaptive = ["fairseq.criterion._name=normexp_adaptive_loss"]
    criterion = adaptive if model.endswith("wikitext103") else []
    assert validate(composed(f"task={task}", f"model={model}", *criterion))


@pytest.mark.parametrize("tracking", names("tracking"))
def test_every_tracking_mode_is_valid(tracking: str) -> None:
    settings = composed(f"tracking={tracking}")
    validate(settings)
    assert settings.tracking.mode == tracking


# The training set-ups of the authors' scripts and of the Tensorized Transformer's.
SET_UPS = {
    "table1_iwslt14": {
        "model.encoder.layers": 6,
        "model.decoder.layers": 6,
        "model.encoder.embed_dim": 512,
        "model.encoder.ffn_embed_dim": 1024,
        "model.encoder.attention_heads": 4,
        "model.encoder.normalize_before": True,
        "model.share_all_embeddings": True,
        "model.dropout": 0.3,
        "model.attention_dropout": 0.1,
        "model.activation_dropout": 0.1,
        "optimizer._name": "adam",
        "optimizer.adam_betas": "(0.9, 0.98)",
        "optimizer.weight_decay": 1e-4,
        "lr_scheduler._name": "inverse_sqrt",
        "lr_scheduler.warmup_updates": 8000,
        "lr_scheduler.warmup_init_lr": 1e-7,
        "optimization.lr": [1.5e-3],
        "criterion.label_smoothing": 0.1,
        "dataset.max_tokens": 4096,
        "checkpoint.patience": 5,
    },
    "table1_wmt14": {
        "model.encoder.embed_dim": 1024,
        "model.encoder.ffn_embed_dim": 4096,
        "model.encoder.attention_heads": 16,
        "optimizer.weight_decay": 0.0,
        "lr_scheduler.warmup_updates": 8000,
        "optimization.lr": [3e-3],
        "optimization.update_freq": [128],
        "dataset.max_tokens": 4096,
        "criterion.label_smoothing": 0.1,
    },
    "table2_ptb": {
        "model.decoder_layers": 3,
        "model.decoder_embed_dim": 256,
        "model.decoder_ffn_embed_dim": 2184,  # for as many parameters as the baseline
        "model.dropout": 0.3,
        "task.tokens_per_sample": 32,
        "task.streams": 120,
        "dataset.batch_size": 120,
        "dataset.max_tokens": 32 * 120,
        "optimization.lr": [2.5e-4],
        "optimization.max_update": 20000,
    },
    "table2_ptb_tensorized": {
        "model._name": "normexp_tensorized_lm",
        "model.decoder_layers": 3,
        "model.decoder_embed_dim": 256,
        "model.decoder_head_dim": 40,
        "model.decoder_ffn_embed_dim": 2100,
        "model.decoder_normalize_before": False,
        "model.dropout": 0.3,
        "task.tokens_per_sample": 32,
        "task.streams": 120,
        "dataset.batch_size": 120,
        "dataset.max_tokens": 32 * 120,
        "optimization.lr": [2.5e-4],
        "optimization.max_update": 20000,
    },
    "table2_wikitext103_tensorized": {
        "model._name": "normexp_tensorized_lm",
        "model.decoder_layers": 6,
        "model.dropout": 0.1,
        "criterion._name": "normexp_adaptive_loss",
        "task.tokens_per_sample": 80,
        "task.streams": 60,
        "dataset.batch_size": 60,
        "dataset.max_tokens": 80 * 60,
        "optimization.lr": [2.5e-4],
        "optimization.max_update": 200000,
    },
    "table2_wikitext103": {
        "model.decoder_layers": 6,
        "model.dropout": 0.1,
        "criterion._name": "normexp_adaptive_loss",
        "task.tokens_per_sample": 80,
        "task.streams": 60,
        "dataset.batch_size": 60,
        "dataset.max_tokens": 80 * 60,
        "optimization.max_update": 200000,
    },
}
EVALUATIONS = {
    "table1_iwslt14": ("average", 5, 5, 1.0),
    "table1_wmt14": ("average", 10, 4, 0.6),
}


@pytest.mark.parametrize("experiment", [name for name in names("experiment") if "table" in name])
def test_experiment_is_the_papers_set_up(experiment: str) -> None:
    settings = composed(f"+experiment={experiment}")
    for key, expected in SET_UPS[experiment].items():
        value = reduce(getitem, key.split("."), settings.fairseq)
        assert value == expected, key
    assert settings.budget is None
    if experiment in EVALUATIONS:
        evaluation = settings.evaluation
        assert EVALUATIONS[experiment] == (
            evaluation.checkpoint,
            evaluation.average_last,
            evaluation.beam,
            evaluation.length_penalty,
        )
    if not settings.fairseq["common"].get("fp16") or torch.cuda.is_available():
        validate(settings)


@pytest.mark.parametrize("experiment", names("experiment"))
def test_experiment_sweeps_over_known_norms(experiment: str) -> None:
    text = OmegaConf.load(CONFIGS / "experiment" / f"{experiment}.yaml")
    swept = set(text.hydra.sweeper.params.norm.split(","))
    of_the_paper = {"layer", "batch", "power_v", "power"}
    needed = {"layer", "power"} if experiment.startswith("precision") else of_the_paper
    assert needed <= swept <= set(names("norm"))


def test_released_translation_variant_keeps_the_final_norms_warm_up() -> None:
    sites = validate(composed("task=iwslt14", "norm=power_released_mt")).sites
    warmups = {site: norm.get("warmup_steps") for site, norm in sites.items()}
    assert warmups["encoder_attention"] == warmups["encoder_ffn"] == 8000
    assert warmups["encoder_final"] == 1000
    assert {norm["num_groups"] for norm in sites.values() if "num_groups" in norm} == {4}


BAD = [
    (["norm.options.alpha_fwd=1.5"], "power", r"alpha_fwd must lie in \[0, 1\)"),
    (["+norm.options.alpha=0.5"], "power", "no option 'alpha'; its options: eps"),
    (["norm.name=powr"], "layer", "unknown normalization 'powr'; known: .*power_v"),
    (["+norm.sites.encoder_fnn=power"], "layer", "unknown site 'encoder_fnn'.*encoder_ffn"),
    (["norm.sites.decoder_ffn=powr"], "layer", "unknown normalization 'powr'"),
    (
        ["norm.sites.encoder_final=batch", "fairseq.model.encoder.normalize_before=false"],
        "layer",
        "this model has no encoder_final",
    ),
    (["model=lm_tiny"], "layer", "needs a model of the type normexp_transformer"),
    (["fairseq.task._name=language_modeling"], "layer", "does not fit task.kind=translation"),
    (["+fairseq.model.encoder_layerz=2"], "layer", "encoder_layerz"),
    (["+fairseq.optimization.learning_rate=2"], "layer", "learning_rate"),
    (["fairseq.optimizer._name=adm"], "layer", "'adm' is unknown; known: .*adam"),
    (
        ["fairseq.criterion._name=adaptive_loss", "~fairseq.criterion.label_smoothing"],
        "layer",
        "belong together",
    ),
    (["task=toy_language_model", "model=tensorized_wikitext103"], "layer", "belong together"),
    (
        ["fairseq.criterion._name=label_smoothed_cross_entropy"],
        "regularized_batch",
        "use normexp_label_smoothed_cross_entropy",
    ),
    (["norm.options.num_groups=3"], "group", "num_groups=3 does not divide"),
    (["norm.sites.decoder_ffn=instance"], "layer", "would see the later ones"),
    (["fairseq.optimization.max_update=0"], "layer", "would never end"),
    (["+fairseq.dataset.required_batch_size_multiple=8"], "layer", "drops the last sentences"),
    (["+fairseq.dataset.update_epoch_batch_itr=false"], "layer", "resumed run"),
    (["+fairseq.dataset.skip_invalid_size_inputs_valid_test=true"], "layer", "meaningless"),
    (["seed=0"], "layer", "seed=0 must be an integer from 1"),
    (["seed=one"], "layer", "seed='one' must be an integer"),
    (["label=a/b"], "layer", "names files"),
    (["evaluation.checkpoint=first"], "layer", "known: average, best"),
    (["evaluation.beam=0"], "layer", "evaluation.beam=0 must be"),
    (["evaluation.splits=[tset]"], "layer", "known: valid, test"),
    (["tracking.mode=on"], "layer", "tracking"),
    (
        ["+experiment=table2_ptb", "fairseq.dataset.batch_size=50"],
        "layer",
        "batch_size that divides them, not 50",
    ),
]


@pytest.mark.parametrize(("overrides", "norm", "message"), BAD, ids=lambda v: str(v)[:40])
def test_bad_setting_is_named_before_any_work(
    overrides: list[str], norm: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        validate(composed(f"results_dir={tmp_path / 'results'}", f"norm={norm}", *overrides))
    assert not (tmp_path / "results").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="half precision works on this machine")
def test_half_precision_needs_a_gpu() -> None:
    with pytest.raises(UserError, match="fp16=true needs a GPU"):
        validate(composed("task=wmt14"))


def test_run_folder_belongs_to_one_process(tmp_path: Path) -> None:
    base = [f"results_dir={tmp_path}"]
    with open_run(composed(*base)) as folder:
        assert OmegaConf.load(folder.config).seed == 1
        with (
            pytest.raises(UserError, match="in use by another process"),
            open_run(composed(*base)),
        ):
            pass
    with open_run(composed(*base, "tracking=disabled")) as again:
        assert again == folder  # tracking does not change a result


def test_unwritable_results_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot write the run folder"),
        open_run(composed(f"results_dir={tmp_path / 'file'}")),
    ):
        pass


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a file system that makes no folders")
@pytest.mark.timeout(20)
def test_a_folder_that_cannot_be_made_is_named() -> None:
    with (
        pytest.raises(UserError, match="cannot write the run folder"),
        open_run(composed("results_dir=/proc/normexp")),
    ):
        pass


def test_blocks_that_fairseq_cannot_make_with_this_numpy_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = composed("task=toy_language_model", "fairseq.task.sample_break_mode=eos")
    monkeypatch.delattr("numpy.compat", raising=False)
    with pytest.raises(UserError, match="use complete or none"):
        validate(settings)
    monkeypatch.setattr("numpy.compat", object(), raising=False)
    validate(settings)
