"""Training updates of the paper's models: tokens per second, peak memory, hours that follow."""

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from normexp.benchmarks.gpu import generated
from normexp.benchmarks.gpu.section import Row, device, one_line, timed
from normexp.norms.kernels.choice import use_kernels

STOCK = "fairseq, float16"
_OFF = ("speed.fast_dropout=false", "speed.fused_loss=false", "speed.fused_adam=false")
_STOCK = (*_OFF, "norm=layer", "++fairseq.common.fp16=false")
_BFLOAT16 = ("speed.precision=bfloat16", "++fairseq.common.fp16=false")
_FLOAT32 = ("speed.precision=float32", "++fairseq.common.fp16=false")
WARM_UPDATES = 3
ROUNDS = 7


@dataclass(frozen=True)
class Configuration:
    """How an update is computed: overrides of scripts/train.py; stock: by fairseq's own model."""

    overrides: tuple[str, ...]
    stock: bool = False
    kernels: str = "triton"


CONFIGURATIONS = {
    STOCK: Configuration((*_STOCK, "++fairseq.common.fp16=true"), stock=True),
    "fairseq, bfloat16": Configuration((*_STOCK, "+fairseq.common.bf16=true"), stock=True),
    "fairseq, float32": Configuration(_STOCK, stock=True),
    "LN, bfloat16": Configuration(("norm=layer", *_BFLOAT16)),
    "PN, bfloat16": Configuration(("norm=power", *_BFLOAT16)),
    "PN as released, bfloat16": Configuration(("norm=power_released_mt", *_BFLOAT16)),
    "PN, plain torch, bfloat16": Configuration(("norm=power", *_BFLOAT16), kernels="plain"),
    "LN, float32": Configuration(("norm=layer", *_FLOAT32)),
    "PN, float32": Configuration(("norm=power", *_FLOAT32)),
}


class Model(NamedTuple):
    """One of the paper's, with the size of its dictionary and a batch of 4,096 tokens a side."""

    experiment: str
    vocabulary: int
    sentences: int
    longest: int


MODELS = {
    "IWSLT14 small": Model("table1_iwslt14", 10_152, 128, 32),
    "WMT14 big": Model("table1_wmt14", 33_712, 128, 32),
}
TINY = tuple(
    f"fairseq.model.{side}.{key}={value}"
    for side in ("encoder", "decoder")
    for key, value in {
        "layers": 1, "embed_dim": 16, "ffn_embed_dim": 16, "attention_heads": 4
    }.items()
)  # fmt: skip
_TINY_BATCH = {"vocabulary": 50, "sentences": 3, "longest": 6}

# The Tensorized Transformer at the sizes of the publication.
LANGUAGE_MODEL = "table2_ptb_tensorized"
PTB_TYPES, SEGMENTS, SEGMENT, PTB_UPDATES = 10_000, 120, 32, 20_000
LANGUAGE_CONFIGURATIONS = {
    f"{label}, {attention}": Configuration(
        (f"norm={norm}", f"fairseq.model.attention={attention}", *_FLOAT32)
    )
    for attention in ("published", "causal")
    for label, norm in {"LN": "layer", "PN": "power"}.items()
}
_TINY_LANGUAGE_MODEL = (
    *("fairseq.model.decoder_layers=1", "fairseq.model.decoder_embed_dim=16"),
    *("fairseq.model.decoder_head_dim=4", "fairseq.model.decoder_ffn_embed_dim=16"),
    *("fairseq.task.tokens_per_sample=8", "fairseq.task.streams=4"),
)


def translation_rows(rehearsal: bool) -> Iterator[Row]:
    """Yield the updates of both translation models, by stock fairseq and by us."""
    for name, model in MODELS.items():
        if rehearsal:
            model = model._replace(**_TINY_BATCH)
        words = generated.dictionary(model.vocabulary)
        batch = generated.translation_batch(words, model.sentences, model.longest)
        overrides = f"+experiment={model.experiment}", *(TINY * rehearsal)
        make_task = partial(generated.translation_task, words=words)
        rows = _rows(CONFIGURATIONS, overrides, make_task, batch, STOCK, rehearsal)
        yield from ({"model": name, **row} for row in rows)
        _free()


def language_rows(rehearsal: bool) -> Iterator[Row]:
    """Yield the updates of PTB at the paper's size, and the hours that its 20,000 take."""
    segments, length = (4, 8) if rehearsal else (SEGMENTS, SEGMENT)
    words = generated.dictionary(50 if rehearsal else PTB_TYPES)
    batch = generated.language_batch(words, segments, length)
    overrides = f"+experiment={LANGUAGE_MODEL}", *(_TINY_LANGUAGE_MODEL * rehearsal)
    make_task = partial(generated.language_modeling_task, words=words)
    for row in _rows(
        LANGUAGE_CONFIGURATIONS, overrides, make_task, batch, "LN, published", rehearsal
    ):
        if "milliseconds" in row:
            hours = PTB_UPDATES * row["milliseconds"][1] / 3.6e6
            row |= {"updates": PTB_UPDATES, "hours": round(hours, 3)}
        yield row


def _rows(
    configurations: Mapping[str, Configuration],
    overrides: tuple[str, ...],
    make_task: Callable[[Any], Any],
    batch: Mapping[str, Any],
    baseline: str,
    rehearsal: bool,
) -> Iterator[Row]:
    """Time the updates of all configurations on one batch, interleaved.

    `ratio` is to the configuration `baseline`, None where that one does not run.
    """
    calls: dict[str, Callable[[], None]] = {}
    peak_memory: dict[str, int | None] = {}
    for label, one in configurations.items():
        try:
            update, peak = _build(one, (*overrides, *one.overrides), make_task, batch)
        except Exception as error:  # the other configurations are to be measured
            yield {"skipped": label, "reason": one_line(error)}
        else:
            calls[label], peak_memory[label] = update, peak
    timings = timed(calls, ROUNDS, rehearsal)
    for label in calls:
        seconds = timings.quartiles(label)
        ratios = timings.ratios(label, baseline) if baseline in calls else None
        yield {
            "configuration": label,
            "milliseconds": [round(1e3 * value, 3) for value in seconds],
            "tokens_per_second": round(batch["ntokens"] / seconds[1]),
            "peak_memory_bytes": peak_memory[label],
            "baseline": baseline,
            "ratio": ratios and [round(ratio, 3) for ratio in ratios],
            **timings.rounds,
        }


def _build(
    configuration: Configuration,
    overrides: tuple[str, ...],
    make_task: Callable[[Any], Any],
    batch: Mapping[str, Any],
) -> tuple[Callable[[], None], int | None]:
    """A call that does an update, after a few of them; most bytes that it holds of a GPU."""
    from fairseq.trainer import Trainer

    from normexp.training import speed

    _free()
    on_gpu = device().type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    settings = generated.settings_of(*overrides)
    cfg = generated.fairseq_config(settings, configuration.stock, cpu=not on_gpu)
    task = make_task(cfg)
    torch.manual_seed(1)
    model, criterion = task.build_model(cfg.model), task.build_criterion(cfg.criterion)
    if not configuration.stock:
        speed.apply_to_model(settings.speed, model, criterion)
    trainer = Trainer(cfg, task, model, criterion)

    def update() -> None:
        use_kernels(configuration.kernels)
        trainer.train_step([batch])

    for _ in range(WARM_UPDATES):
        update()
    if not on_gpu:
        return update, None
    torch.cuda.reset_peak_memory_stats()
    update()
    return update, torch.cuda.max_memory_allocated() - before


def _free() -> None:
    gc.collect()
    if device().type == "cuda":
        torch.cuda.empty_cache()
