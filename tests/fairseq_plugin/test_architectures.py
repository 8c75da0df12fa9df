"""--arch normexp_<stem> and configs/model/<stem>.yaml are one model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import models, tasks
from fairseq.data import Dictionary
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from fairseq.modules.fairseq_dropout import FairseqDropout
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from torch import nn

from normexp.fairseq_plugin.architectures import register_architectures
from normexp.fairseq_plugin.tensorized import TensorizedLayer

PRESETS = Path(__file__).resolve().parents[2] / "configs" / "model"
STEMS = sorted(file.stem for file in PRESETS.glob("*.yaml"))


@pytest.fixture
def preset_pair(
    command_line_config: Callable[..., DictConfig],
    structured_config: Callable[..., DictConfig],
    translation_data: Path,
    language_model_data: Path,
) -> Callable[..., tuple[DictConfig, DictConfig]]:
    """Return the configurations of one preset built in both ways."""

    def configure(stem: str) -> tuple[DictConfig, DictConfig]:
        preset = OmegaConf.load(PRESETS / f"{stem}.yaml")
        is_lm = preset._name != "normexp_transformer"
        task = "language_modeling" if is_lm else "translation"
        data = str(language_model_data if is_lm else translation_data)
        return (
            command_line_config(data, "--task", task, "--arch", f"normexp_{stem}"),
            structured_config(model=preset, task={"_name": task, "data": data}),
        )

    return configure


def _build(config: DictConfig, vocabulary: int = 70_000) -> nn.Module:
    """Build without memory, for a vocabulary beyond the adaptive cutoffs."""
    task = tasks.setup_task(config.task)
    words = Dictionary()
    for i in range(vocabulary):
        words.add_symbol(f"w{i}")
    task.src_dict = task.tgt_dict = task.dictionary = task.output_dictionary = words
    with torch.device("meta"):
        return models.build_model(config.model, task)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _dropouts(model: nn.Module) -> dict[str, float]:
    """Every dropout probability, those of the attention weights included."""
    of_modules = {
        name: module.p
        for name, module in model.named_modules()
        if isinstance(module, FairseqDropout)
    }
    of_layers = {
        name: module.dropout
        for name, module in model.named_modules()
        if isinstance(module, TensorizedLayer)
    }
    return of_modules | of_layers


@pytest.mark.parametrize("stem", STEMS)
def test_command_line_and_configuration_give_the_same_model(
    stem: str, preset_pair: Callable[..., tuple[DictConfig, DictConfig]]
) -> None:
    command_line, structured = preset_pair(stem)
    assert OmegaConf.to_container(command_line.model) == OmegaConf.to_container(structured.model)
    ours, theirs = _build(command_line), _build(structured)
    assert _shapes(ours) == _shapes(theirs)
    assert _dropouts(ours) == _dropouts(theirs) != {}


@pytest.mark.parametrize("stem", [stem for stem in STEMS if not stem.startswith("tensorized")])
def test_built_model_has_the_sizes_that_stand_in_the_file(
    stem: str, preset_pair: Callable[..., tuple[DictConfig, DictConfig]]
) -> None:
    preset = OmegaConf.load(PRESETS / f"{stem}.yaml")
    decoder = (
        preset.decoder
        if "decoder" in preset
        else {key[8:]: preset[key] for key in preset if key.startswith("decoder_")}
    )
    model = _build(preset_pair(stem)[0])
    layers = model.decoder.layers
    assert len(layers) == decoder["layers"]
    assert layers[0].fc1.weight.shape == (decoder["ffn_embed_dim"], decoder["embed_dim"])
    assert layers[0].self_attn.num_heads == decoder["attention_heads"]
    assert layers[0].dropout_module.p == preset.dropout
    assert layers[0].self_attn.dropout_module.p == preset.attention_dropout
    assert layers[0].activation_dropout_module.p == preset.activation_dropout
    assert (model.decoder.layer_norm is not None) == decoder["normalize_before"]


@pytest.mark.parametrize(
    ("stem", "arch", "flags"),
    [
        (
            "iwslt_small",
            "transformer_iwslt_de_en",
            "--encoder-normalize-before --decoder-normalize-before --dropout 0.3 "
            "--attention-dropout 0.1 --activation-dropout 0.1",
        ),
        ("wmt_big", "transformer_wmt_en_de_big_t2t", ""),
    ],
)
def test_the_papers_translation_models_are_fairseqs_architectures(
    stem: str,
    arch: str,
    flags: str,
    preset_pair: Callable[..., tuple[DictConfig, DictConfig]],
    command_line_config: Callable[..., DictConfig],
    translation_data: Path,
) -> None:
    stock = command_line_config(
        str(translation_data), "--arch", arch, "--share-all-embeddings", *flags.split()
    )
    expected, ours = _build(stock), _build(preset_pair(stem)[0])
    assert _shapes(ours) == _shapes(expected)
    assert _dropouts(ours) == _dropouts(expected)
    assert ours.encoder.layers[0].self_attn.num_heads == (
        expected.encoder.layers[0].self_attn.num_heads
    )


def test_flags_override_the_preset(
    command_line_config: Callable[..., DictConfig],
    translation_data: Path,
    language_model_data: Path,
) -> None:
    flags = "--encoder-layers 2 --dropout 0.0 --decoder-ffn-embed-dim 72 --norm power"
    model = command_line_config(
        str(translation_data), "--arch", "normexp_iwslt_small", *flags.split()
    ).model
    assert (model.encoder.layers, model.decoder.layers) == (2, 6)
    assert (model.encoder.ffn_embed_dim, model.decoder.ffn_embed_dim) == (1024, 72)
    assert (model.dropout, model.attention_dropout, model.norm) == (0.0, 0.1, "power")

    flags = "--task language_modeling --arch normexp_lm_tiny --decoder-embed-dim 64"
    model = command_line_config(str(language_model_data), *flags.split()).model
    dims = (model.decoder_embed_dim, model.decoder_input_dim, model.decoder_output_dim)
    assert dims == (64, 64, 64)


def test_the_plain_model_takes_nested_values_from_flags(
    command_line_config: Callable[..., DictConfig], translation_data: Path
) -> None:
    sites = '{"decoder_ffn": {"name": "power", "alpha_fwd": 0.5}}'
    model = command_line_config(
        str(translation_data),
        *("--arch", "normexp_transformer", "--encoder-embed-dim", "32", "--norm-sites", sites),
        *("--encoder-embed-path", "/a folder/it's größe.vec", "--quant-noise-pq", "0.25"),
    ).model
    assert model.encoder.embed_dim == 32
    assert model.encoder.embed_path == "/a folder/it's größe.vec"
    assert model.quant_noise.pq == 0.25
    assert model.norm_sites == sites
    assert model.decoder.embed_dim == 512  # fairseq's default


def test_the_configuration_names_the_model_and_not_the_preset(
    preset_pair: Callable[..., tuple[DictConfig, DictConfig]],
) -> None:
    # What a checkpoint says must not change its meaning when a preset does.
    assert preset_pair("iwslt_small")[0].model._name == "normexp_transformer"


def test_an_architecture_named_in_a_configuration_is_refused(
    build_translation: Callable[..., Any],
) -> None:
    with pytest.raises(ValueError, match=r"_name: normexp_transformer .*model/iwslt_small\.yaml"):
        build_translation(_name="normexp_iwslt_small")


def test_every_preset_is_an_architecture_of_its_model() -> None:
    assert STEMS
    for stem in STEMS:
        model = OmegaConf.load(PRESETS / f"{stem}.yaml")._name
        assert ARCH_MODEL_REGISTRY[f"normexp_{stem}"] is MODEL_REGISTRY[model]


def test_presets_do_not_bear_names_that_fairseq_knows() -> None:
    store = ConfigStore.instance().repo
    taken = {name.removesuffix(".yaml") for name in store["model"]}
    assert "transformer_lm" in taken
    assert not (taken | set(ARCH_MODEL_REGISTRY) | set(MODEL_REGISTRY)) & set(STEMS)


def test_a_missing_configs_folder_means_no_presets(tmp_path: Path) -> None:
    before = dict(ARCH_MODEL_REGISTRY)
    register_architectures(tmp_path / "configs" / "model")
    assert before == ARCH_MODEL_REGISTRY
