"""A decision for every key of fairseq's configuration, and what is said of the forbidden ones."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
from omegaconf import OmegaConf
from support.small_runs import REPOSITORY, composed

from normexp.config import fairseq_keys
from normexp.config.fairseq_config import typed_config, with_defaults
from normexp.config.fairseq_keys import ALL, COMPONENTS, decisions, registries
from normexp.config.settings import FAIRSEQ_TASKS, PLUGIN_MODELS, ExperimentSettings, validated
from normexp.config.validation import validate
from normexp.errors import UserError

TRANSLATION, LANGUAGE_MODEL = "task=toy_translation", "task=toy_language_model"


def keys_of(dataclass: type, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(dataclass):
        if dataclasses.is_dataclass(field.type):
            yield from keys_of(field.type, f"{prefix}{field.name}.")
        elif field.name != "_name":
            yield f"{prefix}{field.name}"


def sections_of_fairseq() -> dict[str, set[str]]:
    """Section -> keys, walked through fairseq's dataclasses."""
    from fairseq.dataclass.configs import FairseqConfig

    sections = {
        field.name: set(keys_of(field.type)) if dataclasses.is_dataclass(field.type) else set()
        for field in dataclasses.fields(FairseqConfig)
        if field.name not in COMPONENTS and field.name != "_name"
    }
    chosen = {
        "model": {name for names in PLUGIN_MODELS.values() for name in names},
        "task": {name for names in FAIRSEQ_TASKS.values() for name in names},
    }
    for group, registry in registries().items():
        for name in chosen.get(group, registry):
            sections[f"{group}.{name}"] = set(keys_of(registry[name]))
    return sections


def undecided(sections: dict[str, set[str]]) -> set[str]:
    known = decisions()
    return {
        f"{section}.{key}"
        for section, keys in sections.items()
        for key in keys | {ALL}
        if not (known.get(section, {}).keys() & {key, ALL}) and (key != ALL or section not in known)
    }


def test_every_key_of_fairseq_has_a_decision_and_every_decision_a_key() -> None:
    sections = sections_of_fairseq()
    assert len(sections) > 50 and len(sections["dataset"]) > 20
    assert undecided(sections) == set()
    superfluous = {
        f"{section}.{key}"
        for section, keys in decisions().items()
        for key in keys
        if section not in sections or (key != ALL and key not in sections[section])
    }
    assert superfluous == set()


def test_a_key_of_a_new_fairseq_is_noticed_and_refused_until_it_is_decided(monkeypatch) -> None:
    from fairseq.dataclass.configs import DatasetConfig, FairseqConfig

    later = dataclasses.make_dataclass(
        "Later", [("drop_rare", bool, dataclasses.field(default=False))], bases=(DatasetConfig,)
    )
    monkeypatch.setattr(FairseqConfig.__dataclass_fields__["dataset"], "type", later)
    assert undecided(sections_of_fairseq()) == {"dataset.drop_rare"}
    complete = OmegaConf.create({"dataset": {"drop_rare": False}})
    fairseq_keys.check_keys({"dataset": {"drop_rare": False}}, complete)
    complete.dataset.drop_rare = True
    with pytest.raises(UserError, match=r"dataset\.drop_rare=true is not allowed .*no decision"):
        fairseq_keys.check_keys({"dataset": {"drop_rare": True}}, complete)


def test_a_reason_stands_beside_every_refusal() -> None:
    for section, keys in decisions().items():
        for key, decision in keys.items():
            assert decision.reason or decision.decision == "allowed", (section, key)


REFUSED = [
    ("+fairseq.dataset.train_subset=valid", "must be train.*task.corpus"),
    ("+fairseq.dataset.valid_subset=test", "must be valid"),
    ("+fairseq.dataset.valid_subset='valid,test'", "must be valid"),
    ("+fairseq.dataset.max_valid_steps=1", "max_valid_steps=1 .*part of the split"),
    ("+fairseq.dataset.validate_interval=2", "validate_interval_updates"),
    ("+fairseq.dataset.validate_after_updates=9", "validate_interval_updates"),
    ("+fairseq.dataset.disable_validation=true", "chosen by the validation loss"),
    ("+fairseq.dataset.max_tokens_valid=0", "must be at least 1"),
    ("fairseq.dataset.max_tokens=null", "set the size of a batch"),
    ("+fairseq.checkpoint.maximize_best_checkpoint_metric=true", "lowest validation loss"),
    ("+fairseq.checkpoint.best_checkpoint_metric=ppl", "lowest validation loss"),
    ("+fairseq.checkpoint.reset_optimizer=true", "finetune_from_model"),
    ("+fairseq.checkpoint.reset_dataloader=true", "finetune_from_model"),
    ("+fairseq.checkpoint.reset_meters=true", "finetune_from_model"),
    ("+fairseq.checkpoint.reset_lr_scheduler=true", "finetune_from_model"),
    ("+fairseq.checkpoint.optimizer_overrides='{\"lr\": 1}'", "finetune_from_model"),
    ("+fairseq.checkpoint.continue_once=/a.pt", "finetune_from_model"),
    ("+fairseq.checkpoint.restore_file=/a.pt", "finetune_from_model"),
    ("+fairseq.checkpoint.no_save_optimizer_state=true", "forgotten its averages"),
    ("+fairseq.checkpoint.save_dir=/tmp", "set results_dir"),
    ("+fairseq.checkpoint.keep_last_epochs=9", "evaluation.average_last"),
    ("+fairseq.checkpoint.save_interval=0", "must be at least 1"),
    ("+fairseq.optimization.stop_min_lr=0.1", "untrained"),
    ("+fairseq.optimization.skip_remainder_batch=true", "left out"),
    ("+fairseq.optimization.use_bmuf=true", "different models"),
    ("fairseq.optimization.lr=[0.1,0.2]", r"lr=\[0.1, 0.2\] .*1 entry"),
    ("fairseq.optimization.update_freq=[]", "must be an integer or a list of them"),
    ("fairseq.optimization.update_freq=[2,0]", "must be at least 1"),
    ("fairseq.optimization.clip_norm=nan", "must be at least 0"),
    ("fairseq.optimization.clip_norm=inf", "clip_norm=inf .*must be finite"),
    ("fairseq.optimization.lr=1e400", "must be finite"),
    ("fairseq.model.dropout=1", "dropout=1.0 .*must be below 1"),
    ("+fairseq.common.seed=5", "seed=NUMBER"),
    ("+fairseq.common.user_dir=/a", "add the code to normexp"),
    ("+fairseq.common.tpu=true", "CPUs and GPUs"),
    ("+fairseq.common.memory_efficient_bf16=true", "no effect without fairseq.common.bf16"),
    ("+fairseq.common.wandb_project=mine", "tracking.project"),
    ("+fairseq.distributed_training.ddp_backend=fully_sharded", "one of pytorch_ddp, legacy_ddp"),
    ("+fairseq.distributed_training.zero_sharding=os", "whole state of the optimizer"),
    ("+fairseq.bmuf.block_lr=2", "different models"),
    ("+fairseq.generation.beam=4", "evaluation.beam"),
    ("+fairseq.eval_lm.context_window=4", "evaluation.context_window"),
    ("+fairseq.bpe=gpt2", "catalogue"),
    ("+fairseq.scoring={_name: chrf}", "sacreBLEU"),
    ("+fairseq.ema.ema_seed_model=/a.pt", "does not name"),
    ("+fairseq.ema.ema_decay=1.5", "must be at most 1"),
    ("evaluation.checkpoint=ema", "needs fairseq.ema.store_ema=true"),
    ("+fairseq.criterion.ignore_prefix_size=1", "number of all tokens"),
    ("+fairseq.criterion.sentence_avg=true", "fairseq.optimization.sentence_avg"),
    ("+fairseq.criterion.fused=true", "speed.fused_loss"),
    ("fairseq.criterion._name=label_smoothed_cross_entropy_with_rdrop", "perplexity .* is squared"),
    ("fairseq.optimizer._name=composite", "use adam"),
    ("fairseq.optimizer.adam_betas=[0.9,2]", "refuses its settings: Invalid beta"),
    ("fairseq.optimizer.adam_betas=beta", "adam_betas=beta must be two numbers"),
    ("+fairseq.lr_scheduler.force_anneal=2", "does not have"),
    ("+fairseq.model.norm=batch", "norm=NAME"),
    ("+fairseq.model.encoder.layers_to_keep=[0,1]", "left out"),
    ("+fairseq.model.encoder.layerdrop=1.5", "encoder.layerdrop=1.5 .*at most 1"),
    ("+fairseq.model.layernorm_embedding=true", "norm.sites do not choose"),
    ("+fairseq.model.quant_noise.scalar=0.5", "quantization"),
    ("+fairseq.model.merge_src_tgt_embed=true", "share_all_embeddings"),
    ("+fairseq.model.decoder.input_dim=8", "no effect in fairseq's translation models"),
    ("++fairseq.model.decoder.output_dim=8", "must be decoder.embed_dim=128 .*shares the"),
    ('+fairseq.task.eval_bleu_args=\'{"beam": "x"}\'', "end the training at its first validation"),
    ("+fairseq.task.eval_bleu_detok=nosuch", "sacreBLEU"),
    ("+fairseq.task.source_lang=en", "source_lang=en, but it is de in the corpus"),
    ("+fairseq.task.target_lang=fr", "target_lang=fr, but it is en in the corpus"),
    ("+fairseq.task.data=/a", "task.corpus and data.dir"),
    ("+fairseq.task.truncate_source=true", "lose their ends"),
    ("+fairseq.task.left_pad_target=true", "makes NaN"),
    ("+fairseq.task.train_subset=valid", "fairseq.dataset"),
]
OF_LANGUAGE_MODELS = [
    ("+fairseq.task.add_bos_token=true", "predicted and counted"),
    ("+fairseq.task.shorten_method=truncate", "lose tokens"),
    ("+fairseq.task.output_dictionary_size=9", "not comparable"),
    ("+fairseq.task.self_target=true", "next token"),
    ("fairseq.task.sample_break_mode=complete_doc", "one of none, complete, eos"),
    ("fairseq.model.decoder_output_dim=8", "must be decoder_input_dim=128 .*shares the"),
    ("+fairseq.model.tokens_per_sample=32", "must be 64.*fairseq.task"),
    ("+fairseq.model.character_embeddings=true", "as Python"),
    ("+fairseq.model.decoder_layerdrop=-0.1", "at least 0"),
    ("+fairseq.model.scale_attn=true", "norm.sites do not choose"),
    ("+fairseq.checkpoint.save_interval=2", "evaluation.checkpoint=average"),
]


@pytest.mark.parametrize(
    ("task", "override", "message"),
    [
        *((TRANSLATION, *case) for case in REFUSED),
        *((LANGUAGE_MODEL, *case) for case in OF_LANGUAGE_MODELS),
    ],
    ids=lambda value: value.removeprefix("+fairseq."),
)
def test_what_would_spoil_a_result_is_refused_with_key_reason_and_cure(
    task: str, override: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        validate(composed(task, override))
    key = override.lstrip("+").split("=")[0]
    assert ".".join(key.split(".")[:2]) in str(refused.value)


def test_values_without_effect_and_those_of_fairseq_are_accepted() -> None:
    chosen = [
        "+fairseq.dataset.train_subset=train",
        "+fairseq.dataset.max_valid_steps=null",
        "+fairseq.checkpoint.reset_optimizer=false",
        "+fairseq.checkpoint.keep_best_checkpoints=2",
        "+fairseq.generation.beam=5",
        "+fairseq.task.source_lang=de",
        "+fairseq.task.train_subset=train",
        "+fairseq.task.eval_bleu=true",
        "+fairseq.optimization.sentence_avg=true",
        "+fairseq.criterion.sentence_avg=true",  # follows the one before
        "+fairseq.dataset.curriculum=1",
        "+fairseq.model.encoder.layerdrop=0.2",
        "+fairseq.ema.store_ema=true",
        "fairseq.optimization.update_freq=[4,2]",
        "fairseq.criterion._name=cross_entropy",
        "~fairseq.criterion.label_smoothing",
    ]
    valid = validate(composed(TRANSLATION, *chosen))
    assert valid.fairseq.dataset.required_batch_size_multiple == 1
    assert valid.fairseq.optimization.update_freq == [4, 2]
    validate(composed(LANGUAGE_MODEL, "+fairseq.model.tokens_per_sample=64"))


def test_an_adaptive_loss_gets_the_backend_that_it_asks_for() -> None:
    chosen = [
        "++fairseq.model.adaptive_softmax_cutoff='50,80'",
        "fairseq.criterion._name=normexp_adaptive_loss",
        "++fairseq.model.share_decoder_input_output_embed=false",
    ]
    complete = with_defaults(validate(composed(LANGUAGE_MODEL, *chosen)).fairseq)
    assert complete.criterion.ddp_backend == "legacy_ddp"


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"_name": "polynomial_decay"}, "assert cfg.total_num_update > 0"),
        ({"_name": "cosine"}, "--lr-period-updates must be set"),
        ({"_name": "tri_stage"}, "specify steps or phase_ratio"),
        ({"_name": "triangular", "max_lr": 0.001}, "max_lr must be more than lr"),
        ({"_name": "inverse_sqrt", "warmup_updates": 0}, "must be at least 1"),
        ({"_name": "pass_through"}, "use inverse_sqrt"),
        ({"_name": "fixed"}, None),
        ({"_name": "reduce_lr_on_plateau"}, None),
        ({"_name": "step", "warmup_updates": 4}, None),
    ],
    ids=lambda value: value["_name"] if isinstance(value, dict) else "",
)
def test_a_schedule_that_cannot_be_built_is_refused_before_any_work(
    schedule: dict[str, Any], message: str | None
) -> None:
    content = composed(LANGUAGE_MODEL, "fairseq.optimization.max_epoch=2").model_dump()
    content["fairseq"]["lr_scheduler"] = schedule
    content["fairseq"]["optimization"]["max_update"] = 0
    settings = validated(ExperimentSettings, {key: content[key] for key in EXPERIMENT})
    if message is None:
        validate(settings)
        return
    with pytest.raises(UserError, match=message):
        validate(settings)


EXPERIMENT = tuple(ExperimentSettings.model_fields)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("statistics", ["synchronized", "local"])
def test_layers_left_out_at_random_and_statistics_of_all_ranks_exclude_each_other(
    ranks: int, statistics: str
) -> None:
    base = [f"distributed.ranks={ranks}", f"distributed.statistics={statistics}", "norm=power"]
    settings = composed(LANGUAGE_MODEL, *base, "+fairseq.model.decoder_layerdrop=0.3")
    if ranks == 2 and statistics == "synchronized":
        with pytest.raises(UserError, match=r"decoder_layerdrop.*statistics=local"):
            validate(settings)
    else:
        validate(settings)
    # The decoder's norms of a translation model are LN, which asks no other rank.
    validate(composed(TRANSLATION, *base, "+fairseq.model.decoder.layerdrop=0.3"))


def test_committed_records_are_of_allowed_settings() -> None:
    paths = sorted((REPOSITORY / "results" / "records").glob("*/*.json"))
    assert len(paths) > 10
    for path in paths:
        config = json.loads(path.read_text(encoding="utf-8"))["config"]
        typed_config(validated(ExperimentSettings, config))
