"""Folding of a trained model's norms into the linear layers that follow them, for inference."""

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normexp.fairseq_plugin.layers import NormDecoderLayer, NormEncoderLayer
from normexp.fairseq_plugin.stacks import NormEncoder
from normexp.fairseq_plugin.tensorized import TensorizedLayer
from normexp.norms.fold_into_linear import fold_into, why_not_foldable

logger = logging.getLogger(__name__)


class FoldedNorm(nn.Module):
    """Takes the place of a folded norm: y = x, contiguous in memory.

    fairseq's hidden states (T, B, C) are a view of (B, T, C), and a norm's output is contiguous.
    Linear layers are slower on the view, by more than the folding gains.
    """

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Return x (T, B, C) made contiguous. The mask is ignored."""
        return x.contiguous()


@dataclass(frozen=True)
class _Place:
    """A norm at a site with the layers that read its output."""

    site: str
    norm: nn.Module
    readers: list[nn.Module]
    remove: Callable[[], None]  # puts a FoldedNorm, or nothing, in its place
    why_not: str | None  # why the architecture does not allow folding


def fold_norms(model: nn.Module) -> nn.Module:
    """Return a copy of a model, in eval mode, with per-channel norms merged into linear layers.

    model: a model of this plugin. The sites of pre-norm stacks whose norm is `batch`,
    `regularized_batch`, `power_v`, `power` or `unified` are folded; outputs equal those of the
    unfolded model in eval mode to rounding. Other sites stay as they are, and the reason is logged.
    Folding computes in float64. Fold in float32 and convert to half precision afterwards: weights
    that are in half precision already are rounded a second time, which is logged as a warning.

    The copy is for inference: it has no statistics to train with, and its parameters take no
    gradients. Where the output projection was tied to the embeddings, a folded final norm unties
    it: C x V more parameters. The outputs of the encoder and of extract_features are without a
    final norm that was folded.

    Raises ValueError, naming each reason, if no site can be folded.
    """
    folded = copy.deepcopy(model)
    folded.eval()  # returns None after fairseq's make_generation_fast_
    done: dict[str, str] = {}
    left: dict[str, str] = {}
    places = list(_places(folded))
    # Layers may share a projection while each has a norm of its own before it.
    readings = Counter(reader for place in places for reader in set(place.readers))
    for place in places:
        reason = why_not_foldable(place.norm) or place.why_not
        if reason is None and not all(isinstance(reader, nn.Linear) for reader in place.readers):
            reason = "what follows is no plain linear layer"
        if reason is None and any(readings[reader] > 1 for reader in place.readers):
            reason = "a linear layer that follows also follows another norm"
        if reason is not None:
            left[place.site] = reason
            continue
        fold_into(place.norm, place.readers)
        place.remove()
        done[place.site] = type(place.norm).__name__
    if not done:
        reasons = "; ".join(f"{site}: {reason}" for site, reason in left.items())
        raise ValueError(f"no norm of this model can be folded ({reasons or 'it has none'})")
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters()):
        logger.warning("folded in half precision; fold in float32 and convert afterwards")
    for site, name in done.items():
        logger.info("folded: %s (%s)", site, name)
    for site, reason in left.items():
        logger.info("not folded: %s (%s)", site, reason)
    return folded.requires_grad_(False)


def _places(model: nn.Module) -> Iterator[_Place]:
    for stack in (getattr(model, "encoder", None), getattr(model, "decoder", None)):
        if stack is None:
            continue
        side = "encoder" if isinstance(stack, NormEncoder) else "decoder"
        for layer in stack.layers.children():  # each once, also where a stack repeats a layer
            if isinstance(layer, NormEncoderLayer | NormDecoderLayer | TensorizedLayer):
                yield from _places_of_layer(side, layer)
        if getattr(stack, "layer_norm", None) is None:
            continue
        if side == "encoder":
            yield _final_of_encoder(stack, model.decoder)
        else:
            yield _final_of_decoder(stack)


def _places_of_layer(side: str, layer: nn.Module) -> Iterator[_Place]:
    post_norm = None
    if not layer.normalize_before:
        post_norm = "post-norm: the residual stream carries what the norm gives"
    attention = layer.self_attn
    if isinstance(layer, TensorizedLayer):
        projections = [attention.qkv]
    else:
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    crossing = "attention over the encoder's states too" if _mixes_states(layer) else None
    yield _Place(
        f"{side}_attention",
        layer.self_attn_layer_norm,
        projections,
        _replaced(layer, "self_attn_layer_norm"),
        post_norm or crossing,
    )
    if getattr(layer, "encoder_attn", None) is not None:
        yield _Place(
            f"{side}_cross",
            layer.encoder_attn_layer_norm,
            [layer.encoder_attn.q_proj],
            _replaced(layer, "encoder_attn_layer_norm"),
            post_norm,
        )
    yield _Place(
        f"{side}_ffn",
        layer.final_layer_norm,
        [layer.fc1],
        _replaced(layer, "final_layer_norm"),
        post_norm,
    )


def _mixes_states(layer: nn.Module) -> bool:
    # fairseq's cross_self_attention: keys are the encoder's states and the layer's own.
    return bool(getattr(layer, "cross_self_attention", False))


def _final_of_encoder(encoder: nn.Module, decoder: nn.Module) -> _Place:
    readers, reason = [], None
    for layer in decoder.layers:
        if getattr(layer, "encoder_attn", None) is not None:
            readers += [layer.encoder_attn.k_proj, layer.encoder_attn.v_proj]
        if _mixes_states(layer):
            reason = "decoder layers read the encoder's states beside their own"
    if not readers:
        reason = "no layer of the decoder reads the encoder's states by a projection of its own"

    return _Place(
        "encoder_final", encoder.layer_norm, readers, _replaced(encoder, "layer_norm"), reason
    )


def _final_of_decoder(decoder: nn.Module) -> _Place:
    reader = decoder.project_out_dim or decoder.output_projection
    adaptive = reader is None and decoder.adaptive_softmax is not None
    reason = "an adaptive softmax follows, not one linear layer" if adaptive else None

    def remove() -> None:
        decoder.layer_norm = None

    return _Place("decoder_final", decoder.layer_norm, [reader], remove, reason)


def _replaced(owner: nn.Module, attribute: str) -> Callable[[], None]:
    def remove() -> None:
        setattr(owner, attribute, FoldedNorm())

    return remove
