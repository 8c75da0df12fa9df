"""The recorded checkpoints, and a model of ours written as the authors' code would have."""

import argparse
import json
import sys
import types
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from fairseq.data import Dictionary
from omegaconf import OmegaConf
from torch import Tensor, nn

from normexp.fairseq_plugin.transformer import NormTransformerConfig, NormTransformerModel
from normexp.norms import norm_class

GOLDEN = Path(__file__).parents[1] / "checkpoints" / "golden"
RECORDED = ("power_power_layer_layer", "batch_batch_layer_layer")
WORDS = 20
# What their command line holds for a model with 8 channels, and other numbers of heads, so of
# groups, in encoder and decoder.
ARGUMENTS = {
    "arch": "transformer_iwslt_de_en_v2",
    "task": "translation",
    "source_lang": "de",
    "target_lang": "en",
    "data": "data-bin/toy",
    "left_pad_source": True,
    "left_pad_target": False,
    "criterion": "label_smoothed_cross_entropy",
    "label_smoothing": 0.1,
    "sentence_avg": False,
    "optimizer": "adam",
    "adam_betas": "(0.9, 0.98)",
    "adam_eps": 1e-8,
    "weight_decay": 1e-4,
    "lr_scheduler": "inverse_sqrt",
    "lr": [0.003],
    "warmup_updates": 70,
    "warmup_init_lr": 1e-7,
    "encoder_spec_norm": False,
    "layer_wise_attention": False,
    "encoder_embed_path": None,
    "decoder_embed_path": None,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_embed_dim": 8,
    "decoder_embed_dim": 8,
    "decoder_input_dim": 8,
    "decoder_output_dim": 8,
    "encoder_ffn_embed_dim": 12,
    "decoder_ffn_embed_dim": 12,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_normalize_before": True,
    "decoder_normalize_before": True,
    "share_all_embeddings": True,
    "share_decoder_input_output_embed": True,
    "dropout": 0.1,
    "relu_dropout": 0.2,
    "max_source_positions": 64,
    "max_target_positions": 96,
}
NAMES = {"layer": "layer", "batch": "batch_released", "power": "power_released"}
# our buffer -> their buffer and its shape
BUFFERS = {
    "batch": {
        "running_mean": ("running_mean", (-1,)),
        "running_var": ("running_var", (-1,)),
        "step": ("num_batches_tracked", ()),
    },
    "power": {
        "running_psi2": ("running_phi", (1, -1, 1, 1)),
        "e": ("ema_gz", (1, -1, 1, 1)),
        "step": ("iters", (1,)),
    },
}


def arguments(norms: tuple[str, ...], **changes: Any) -> argparse.Namespace:
    """Their arguments; norms: encoder attention, encoder FFN, decoder attention, decoder FFN."""
    sites = ("encoder_norm_self", "encoder_norm_ff", "decoder_norm_self", "decoder_norm_ff")
    return argparse.Namespace(**{**ARGUMENTS, **dict(zip(sites, norms, strict=True)), **changes})


def dictionary() -> Dictionary:
    words = Dictionary()
    for i in range(WORDS):
        words.add_symbol(f"w{i}")
    return words


def build_model(args: argparse.Namespace) -> NormTransformerModel:
    """The model that their code would build, with random weights and running statistics."""
    chosen = {
        "encoder_attention": args.encoder_norm_self,
        "encoder_ffn": args.encoder_norm_ff,
        "encoder_final": args.encoder_norm_ff,
        "decoder_attention": args.decoder_norm_self,
        "decoder_cross": args.decoder_norm_self,
        "decoder_ffn": args.decoder_norm_ff,
        "decoder_final": args.decoder_norm_ff,
    }
    if not args.encoder_normalize_before:
        del chosen["encoder_final"], chosen["decoder_final"]
    sites = {site: _choice(site, norm, args) for site, norm in chosen.items()}
    stacks = {
        stack: {
            key: getattr(args, f"{stack}_{key}")
            for key in ("layers", "embed_dim", "ffn_embed_dim", "attention_heads")
        }
        | {
            "normalize_before": getattr(args, f"{stack}_normalize_before"),
            "learned_pos": getattr(args, f"{stack}_learned_pos", False),
        }
        for stack in ("encoder", "decoder")
    }
    for width in ("input_dim", "output_dim"):
        stacks["decoder"][width] = getattr(args, f"decoder_{width}")
    shared = ("share_all_embeddings", "share_decoder_input_output_embed")
    positions = ("max_source_positions", "max_target_positions")
    values = {key: getattr(args, key) for key in (*shared, *positions)}
    config = OmegaConf.merge(
        OmegaConf.structured(NormTransformerConfig),
        {**values, **stacks, "norm_sites": json.dumps(sites)},
    )
    words = dictionary()
    task = SimpleNamespace(source_dictionary=words, target_dictionary=words)
    torch.manual_seed(0)
    model = NormTransformerModel.build_model(config, task)
    randomize(model)
    return model.eval()


def _choice(site: str, norm: str, args: argparse.Namespace) -> dict[str, Any]:
    if norm != "power":
        return {"name": NAMES[norm]}
    heads = args.encoder_attention_heads if "encoder" in site else args.decoder_attention_heads
    warmup_steps = 1000 if "final" in site else args.warmup_updates
    return {"name": NAMES[norm], "num_groups": heads, "warmup_steps": warmup_steps}


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Fill parameters and running statistics, every entry with other numbers."""
    for i, (key, value) in enumerate(model.state_dict().items()):
        if key.endswith(".step"):
            value.fill_(100 + i)
        elif key.endswith(("running_var", "running_psi2", "norm.weight")):
            value.uniform_(0.4, 2.5)
        elif not key.endswith(".version"):
            value.normal_(std=0.4)


def their_state_dict(model: NormTransformerModel, args: argparse.Namespace) -> dict[str, Tensor]:
    """The state dict with their names and shapes."""
    theirs = OrderedDict(model.state_dict())
    for path, module in model.named_modules():
        for norm, buffers in BUFFERS.items():
            if isinstance(module, norm_class(NAMES[norm])):
                for our, (their, shape) in buffers.items():
                    value = theirs.pop(f"{path}.{our}")
                    theirs[f"{path}.{their}"] = value.reshape(shape)
    projection = theirs.pop("decoder.output_projection.weight")
    if not args.share_decoder_input_output_embed:
        theirs["decoder.embed_out"] = projection
    for stack in ("encoder", "decoder"):
        if not getattr(args, f"{stack}_learned_pos", False):
            theirs[f"{stack}.embed_positions._float_tensor"] = torch.zeros(1)
    return theirs


def write(path: Path, args: Any, model: Any, **parts: Any) -> Path:
    """Write a file of their format, in torch's old pickle format, with meters."""
    meters = types.ModuleType("fairseq.meters")
    for name in ("AverageMeter", "TimeMeter", "StopwatchMeter"):
        meter = type(name, (), {"__module__": meters.__name__})
        setattr(meters, name, meter)
    average = meters.AverageMeter()
    average.val, average.count = 1.5, 3
    state = {
        "args": args,
        "model": model,
        "optimizer_history": [
            {
                "criterion_name": "LabelSmoothedCrossEntropyCriterion",
                "optimizer_name": "FairseqAdam",
                "lr_scheduler_state": {"best": 1.25},
                "num_updates": 77,
            }
        ],
        "extra_state": {
            "train_iterator": {"epoch": 9, "iterations_in_epoch": 4},
            "val_loss": 1.25,
            "best": 1.25,
            "train_meters": OrderedDict(
                train_loss=average, wps=meters.TimeMeter(), train_wall=meters.StopwatchMeter()
            ),
        },
        "last_optimizer_state": {"state": {}, "param_groups": [{"params": [140234]}]},
        **parts,
    }
    with patch.dict(sys.modules, {meters.__name__: meters}):
        torch.save(state, path, _use_new_zipfile_serialization=False)
    return path
