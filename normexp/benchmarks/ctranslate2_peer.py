"""CTranslate2's beam search of a fairseq model, where the package is installed."""

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_SENTENCES_AT_ONCE = 32


def searches(
    model: nn.Module, task: Any, beam: int, max_len: int, threads: int, folder: Path
) -> dict[str, Callable[[], list[Tensor]]]:
    """The search of the task's test split by its name with the version, or nothing and a notice.

    model: a stock Transformer of fairseq, in float32. Hypotheses have at most max_len words and the
    end of the sentence, as fairseq's have, which adds the end's probability to the score of those
    that are cut off; CTranslate2 does not, so that it may prefer another. threads: batches side by
    side. folder: where the model is converted to.
    """
    if importlib.util.find_spec("ctranslate2") is None:
        logger.warning("CTranslate2 is not installed (pip install ctranslate2): left out")
        return {}
    import ctranslate2

    target = folder / "ctranslate2"
    if not target.exists():
        target.mkdir()
        _convert(model, task, target)
    translator = ctranslate2.Translator(
        str(target), "cpu", compute_type="float32", inter_threads=threads, intra_threads=1
    )
    dataset, dictionary = task.dataset("test"), task.target_dictionary
    sources = [
        [task.source_dictionary[word] for word in dataset[i]["source"][:-1].tolist()]
        for i in range(len(dataset))
    ]

    def search() -> list[Tensor]:
        found = translator.translate_batch(
            sources,
            beam_size=beam,
            length_penalty=1,
            max_decoding_length=max_len,
            max_input_length=0,
            max_batch_size=_SENTENCES_AT_ONCE,
        )
        return [
            torch.tensor(
                [*map(dictionary.index, one.hypotheses[0]), dictionary.eos()], dtype=torch.int
            )
            for one in found
        ]

    return {f"CTranslate2 {ctranslate2.__version__}": search}


@torch.no_grad()  # so that parameters become arrays
def _convert(model: nn.Module, task: Any, folder: Path) -> None:
    from ctranslate2.converters import fairseq
    from ctranslate2.specs import Activation, TransformerSpec

    layers = len(model.encoder.layers), len(model.decoder.layers)
    spec = TransformerSpec.from_config(
        layers,
        model.cfg.encoder.attention_heads,
        pre_norm=model.cfg.encoder.normalize_before,
        activation=Activation.RELU,
    )
    fairseq.set_transformer_encoder(spec.encoder, model.encoder)
    fairseq.set_transformer_decoder(spec.decoder, model.decoder)
    spec.register_source_vocabulary(fairseq._get_vocab(task.source_dictionary))
    spec.register_target_vocabulary(fairseq._get_vocab(task.target_dictionary))
    spec.config.decoder_start_token = spec.config.eos_token
    spec.config.add_source_eos = True
    spec.validate()
    spec.optimize(quantization=None)
    spec.save(str(folder))
