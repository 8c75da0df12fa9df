"""Time of updates of a small Transformer: stock fairseq, the settings of `speed`, torch alone."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.initialize import add_defaults
from fairseq.tasks.translation import TranslationTask
from fairseq.trainer import Trainer
from omegaconf import OmegaConf
from torch.profiler import ProfilerActivity, profile

import normexp.fairseq_plugin  # noqa: F401 (registers models, criterions and the optimizer)
from normexp.benchmarks import torch_transformer
from normexp.benchmarks.benchmark_record import write_record
from normexp.benchmarks.timing import interleave
from normexp.config.fairseq_config import apply_speed
from normexp.config.settings import SpeedSettings
from normexp.norms.kernels.choice import chosen_kernels, use_kernels
from normexp.training import heap, speed

VOCABULARY, SENTENCES, LENGTH = 9792, 100, 40
STOCK = "fairseq"
ALL_BUT_BFLOAT16 = SpeedSettings(fast_dropout=True, fused_loss=True, fused_adam=True)
ALL = ALL_BUT_BFLOAT16.model_copy(update={"precision": "bfloat16"})
FASTEST = "all, compiled"
WARM_UPDATES = 5
_SHAPE = {
    "layers": 3,
    "embed_dim": 256,
    "ffn_embed_dim": 512,
    "attention_heads": 4,
    "normalize_before": True,
}
_DROPOUT = {  # as in the paper's model for IWSLT14
    "dropout": 0.3,
    "attention_dropout": 0.1,
    "activation_dropout": 0.1,
}
_MODEL = {
    "_name": "transformer",
    "encoder": _SHAPE,
    "decoder": _SHAPE,
    "share_all_embeddings": True,
    **_DROPOUT,
}


@dataclass(frozen=True)
class _Configuration:
    speed: SpeedSettings
    kernels: str = "plain"
    encoder_norm: str | None = None  # None: the LayerNorm of fairseq's own model


CONFIGURATIONS = {
    STOCK: _Configuration(SpeedSettings()),
    "fast dropout, torch only": _Configuration(SpeedSettings(fast_dropout=True)),
    "fast dropout, compiled": _Configuration(SpeedSettings(fast_dropout=True), "auto"),
    "fused loss, torch only": _Configuration(SpeedSettings(fused_loss=True)),
    "fused loss, compiled": _Configuration(SpeedSettings(fused_loss=True), "auto"),
    "bfloat16": _Configuration(SpeedSettings(precision="bfloat16")),
    "fused Adam": _Configuration(SpeedSettings(fused_adam=True)),
    "all but bfloat16, torch only": _Configuration(ALL_BUT_BFLOAT16),
    "all but bfloat16, compiled": _Configuration(ALL_BUT_BFLOAT16, "auto"),
    "all, torch only": _Configuration(ALL),
    FASTEST: _Configuration(ALL, "auto"),
    "all, compiled, encoder norm layer": _Configuration(ALL, "auto", "layer"),
    "all, compiled, encoder norm power": _Configuration(ALL, "auto", "power"),
    "all, compiled, encoder norm batch": _Configuration(ALL, "auto", "batch"),
}


def measure(rounds: int, record: Path, progress: bool) -> dict[str, Any]:
    """Time the updates of every configuration, interleaved, on the CPU; write to `record`.

    An update is fairseq's Trainer.train_step on one generated batch of 100 sentence pairs with 20
    to 40 tokens a side, padded to 40. `loss` is the training loss in nats per token of the update
    after WARM_UPDATES others, with dropout: of equal configurations it differs by the masks.
    torch's own Transformer does its updates on the same batch; where torch.compile finds no
    compiler, it is left out, and `skipped` says why.

    Returns what it writes: medians, quartiles of the speed-up computed round by round, the most
    important of them again from a process in which malloc keeps freed memory, as scripts/train.py
    lets it, and tables of what the operators of one update take (`ms` without the operators they
    call).
    """
    measured = _measured(list(CONFIGURATIONS), rounds, progress)
    profiles = {name: _profile(_update(CONFIGURATIONS[name])) for name in (STOCK, FASTEST)}
    return write_record(
        record,
        "training",
        {"rounds": rounds},
        {
            "what": "one update of a Transformer with 3 + 3 layers, 256 channels, 512 in the FFN, "
            f"4 heads and a shared vocabulary of {VOCABULARY}; {_batch()['ntokens']} target tokens "
            f"padded to {SENTENCES * LENGTH}",
            "quartiles": "lower, median, upper",
            **measured,
            "memory_kept": _measured_with_memory_kept(rounds),
            "profiles": profiles,
        },
    )


def _measured(names: list[str], rounds: int, progress: bool) -> dict[str, Any]:
    """Rows of the configurations and of torch's Transformer, and why one was skipped."""
    chosen, skipped = chosen_kernels(), {}
    updates = {name: _update(CONFIGURATIONS[name]) for name in names}
    updates[torch_transformer.NAME] = torch_transformer.compiled_update(
        _batch(), _SHAPE, VOCABULARY, _dictionary().pad(), **_DROPOUT
    )
    try:
        losses = {}
        for name, update in list(updates.items()):
            try:
                for _ in range(WARM_UPDATES):
                    update()
            except Exception as error:  # torch.compile raises many kinds
                if name != torch_transformer.NAME:
                    raise
                skipped[name] = f"torch.compile failed: {str(error).strip().splitlines()[0]}"
                del updates[name]
                continue
            losses[name] = update()
        timings = interleave(updates, rounds, progress)
    finally:
        use_kernels(chosen)
    tokens = _batch()["ntokens"]
    rows = [
        {
            "configuration": name,
            "milliseconds": round(1e3 * timings.quartiles(name)[1], 2),
            "speedup_over_stock": [round(ratio, 3) for ratio in timings.ratios(STOCK, name)],
            "tokens_per_second": round(tokens / timings.quartiles(name)[1]),
            "loss": round(losses[name], 5),
            **timings.rounds,
        }
        for name in updates
    ]
    return {"measured": rows, "skipped": skipped}


def _measured_with_memory_kept(rounds: int) -> dict[str, Any]:
    """The same of STOCK, ALL_BUT_BFLOAT16, FASTEST and torch's, in a process of its own."""
    call = f"print_with_memory_kept({rounds}, {torch.get_num_threads()})"
    program = f"from normexp.benchmarks import bench_training; bench_training.{call}"
    shown = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(shown.stdout.splitlines()[-1])


def print_with_memory_kept(rounds: int, threads: int) -> None:
    """Let malloc keep what is freed, measure, and print the result as one line of JSON."""
    torch.set_num_threads(threads)
    kept = heap.keep_freed()
    names = [STOCK, "all but bfloat16, compiled", FASTEST]
    print(json.dumps({"kept": kept, **_measured(names, rounds, progress=False)}))


def _update(configuration: _Configuration) -> Callable[[], float]:
    """A call that does one update and returns its training loss in nats per token."""
    use_kernels(configuration.kernels)
    trainer, sample = _trainer(configuration), _batch()

    def update() -> float:
        use_kernels(configuration.kernels)
        (logged,) = _logging_outputs(trainer, sample)
        return float(logged["loss"]) / logged["ntokens"]

    return update


def _logging_outputs(trainer: Trainer, sample: dict[str, Any]) -> list[dict[str, Any]]:
    outputs = []
    original = trainer.task.train_step

    def seen(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        outputs.append(output[2])
        return output

    trainer.task.train_step = seen
    try:
        trainer.train_step([sample])
    finally:
        trainer.task.train_step = original
    return outputs


def _trainer(configuration: _Configuration) -> Trainer:
    model = dict(_MODEL)
    if configuration.encoder_norm is not None:
        model |= {"norm": configuration.encoder_norm}
    ours = configuration.speed != SpeedSettings()
    if ours or configuration.encoder_norm is not None:
        model["_name"] = "normexp_transformer"
    node = {
        "common": {"cpu": True, "seed": 1},
        "task": {"_name": "translation"},
        "model": model,
        "criterion": {
            "_name": ("normexp_" if ours else "") + "label_smoothed_cross_entropy",
            "label_smoothing": 0.1,
        },
        "optimizer": {"_name": "adam", "adam_betas": "(0.9, 0.98)", "weight_decay": 1e-4},
        "lr_scheduler": {"_name": "inverse_sqrt", "warmup_updates": 4000},
        "optimization": {"lr": [0.0005]},
    }
    apply_speed(configuration.speed, node)
    cfg = OmegaConf.merge(OmegaConf.structured(FairseqConfig), node)
    add_defaults(cfg)
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
    task = TranslationTask(cfg.task, _dictionary(), _dictionary())
    torch.manual_seed(1)
    built, criterion = task.build_model(cfg.model), task.build_criterion(cfg.criterion)
    speed.apply_to_model(configuration.speed, built, criterion)
    return Trainer(cfg, task, built, criterion)


def _dictionary() -> Dictionary:
    dictionary = Dictionary()
    for word in range(VOCABULARY - len(dictionary)):
        dictionary.add_symbol(str(word))
    return dictionary


def _batch() -> dict[str, Any]:
    """Uniform draws; source padded on the left, target on the right, as fairseq does."""
    generator = torch.Generator().manual_seed(1)
    dictionary = _dictionary()
    shape = (SENTENCES, LENGTH)
    lengths = torch.linspace(LENGTH / 2, LENGTH, SENTENCES).round().long()[:, None]
    place = torch.arange(LENGTH)
    source, target = torch.randint(
        dictionary.nspecial, VOCABULARY, (2, *shape), generator=generator
    )
    target[place == lengths - 1] = dictionary.eos()
    target[place >= lengths] = dictionary.pad()
    source[:, -1] = dictionary.eos()
    source[place < LENGTH - lengths] = dictionary.pad()
    shifted = target.roll(1, 1)
    shifted[:, 0] = dictionary.eos()
    shifted[place >= lengths] = dictionary.pad()
    return {
        "net_input": {
            "src_tokens": source,
            "src_lengths": lengths.squeeze(1),
            "prev_output_tokens": shifted,
        },
        "target": target,
        "ntokens": int(lengths.sum()),
        "nsentences": SENTENCES,
    }


def _profile(update: Callable[[], object]) -> list[dict[str, Any]]:
    """The operators that take at least a hundredth of an update, the longest first."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        update()
    events = [event for event in profiled.key_averages() if event.self_cpu_time_total > 0]
    total = sum(event.self_cpu_time_total for event in events)
    events.sort(key=lambda event: event.self_cpu_time_total, reverse=True)
    return [
        {
            "share": round(event.self_cpu_time_total / total, 4),
            "ms": round(event.self_cpu_time_total / 1e3, 2),
            "what": event.key,
        }
        for event in events
        if event.self_cpu_time_total >= total / 100
    ]
