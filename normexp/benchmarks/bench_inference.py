"""Inference: an encoder with its norms folded, and beam search as the evaluation runs it."""

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from normexp.benchmarks import ctranslate2_peer
from normexp.benchmarks.bench_norms import DTYPES
from normexp.benchmarks.benchmark_record import write_record
from normexp.benchmarks.timing import interleave
from normexp.benchmarks.toy import toy_task
from normexp.norms.kernels.choice import chosen_kernels, use_kernels

BATCHES = {"32 x 40": (32, 40), "32 x 1": (32, 1), "1 x 1": (1, 1)}  # sentences x tokens
ENCODER = {
    "encoder": {"layers": 6, "embed_dim": 512, "ffn_embed_dim": 1024, "attention_heads": 4},
    "decoder": {"layers": 1, "embed_dim": 512, "ffn_embed_dim": 1024, "attention_heads": 4,
                "input_dim": 512, "output_dim": 512},
}  # fmt: skip
BEAM, MAX_TOKENS = 5, 8000
_MOST_TARGET_TOKENS = 40  # an untrained model does not end its sentences
_SEARCH = 4  # rounds of the encoder, to one of the searches
_SHORT_BATCH = 10  # rounds of a batch of single tokens, to one of the others


def measure(rounds: int, record: Path, progress: bool) -> dict[str, Any]:
    """Time an encoder with LN, with PN and with PN folded, and beam search, of untrained models.

    Encoder: 6 pre-norm layers of 512 channels, embedding included, in float32 and bfloat16. Folding
    is done in float32, before the conversion. Beam search: fairseq's Transformer on the toy corpus,
    by normexp.evaluation.scores.translate, by what fairseq-generate does and, where it is
    installed, by CTranslate2; with one thread and with as many as torch has, in a quarter of the
    rounds. Writes to `record`, and returns, medians of milliseconds or of sentences per second,
    quartiles of the ratio to LN or to fairseq, and how many hypotheses are not fairseq's.
    """
    with tempfile.TemporaryDirectory() as folder:
        cfg, task = toy_task("toy_translation", Path(folder))
        encoders = _encoder_rows(cfg, task, rounds, progress)
        searches = _search_rows(cfg, task, rounds, progress)
    result = {
        "what": "forward of an encoder, and beam search over the test split of toy_translation",
        "quartiles": "lower, median, upper",
        "encoder": encoders,
        "beam_search": searches,
    }
    return write_record(record, "inference", {"rounds": rounds}, result)


def _encoder_rows(cfg: DictConfig, task: Any, rounds: int, progress: bool) -> list[dict[str, Any]]:
    from normexp.fairseq_plugin.folding import fold_norms

    layer, power = (_model(cfg, task, norm) for norm in ("layer", "power"))
    models = {"LN": layer, "PN": power, "PN, folded": fold_norms(power)}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for dtype_name, dtype in DTYPES.items():
        encoders = {
            name: copy.deepcopy(model.encoder).to(device, dtype) for name, model in models.items()
        }
        for batch, shape in BATCHES.items():
            tokens = torch.randint(4, len(task.source_dictionary), shape, device=device)
            calls = {name: _forward(encoder, tokens) for name, encoder in encoders.items()}
            timings = interleave(calls, rounds * (_SHORT_BATCH if shape[1] == 1 else 1), progress)
            for name in timings.seconds:
                rows.append(
                    {
                        "batch": batch,
                        "dtype": dtype_name,
                        "norm": name,
                        "milliseconds": round(1e3 * timings.quartiles(name)[1], 4),
                        "ratio_to_layer_norm": _rounded(timings.ratios(name, "LN")),
                        **timings.rounds,
                    }
                )
    return rows


def _model(cfg: DictConfig, task: Any, norm: str) -> nn.Module:
    torch.manual_seed(1)
    changes = {**ENCODER, "norm": norm}
    return task.build_model(OmegaConf.merge(cfg.model, changes)).eval()


def _forward(encoder: nn.Module, tokens: Tensor) -> Callable[[], None]:
    @torch.inference_mode()
    def call() -> None:
        encoder(tokens)

    return call


def _search_rows(cfg: DictConfig, task: Any, rounds: int, progress: bool) -> list[dict[str, Any]]:
    from fairseq.models.transformer import TransformerModelBase

    from normexp.evaluation.scores import LoadedModel

    torch.manual_seed(1)
    short = OmegaConf.merge(cfg.model, {"max_target_positions": _MOST_TARGET_TOKENS})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = TransformerModelBase.build_model(short, task).eval().to(device)
    task.load_dataset("test")
    stock = copy.deepcopy(model)
    stock.make_generation_fast_(need_attn=False)
    searches: dict[str, Callable[[], list[Tensor]]] = {
        "fairseq": lambda: _as_fairseq_generate(task, stock, device),
        **_our_searches(LoadedModel(model, task, cfg, device)),
    }
    threads = torch.get_num_threads()
    numbers = sorted({1, threads})
    hypotheses: dict[str, list[Tensor]] = {}
    calls: dict[str, Callable[[], None]] = {}
    described: dict[str, tuple[str, int]] = {}

    def call(label: str, number: int, search: Callable[[], list[Tensor]]) -> None:
        torch.set_num_threads(number)
        hypotheses[label] = search()

    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            peer = ctranslate2_peer.searches(
                stock, task, BEAM, _MOST_TARGET_TOKENS - 1, number, Path(folder)
            )
            for name, search in {**searches, **peer}.items():
                label = _label(name, number)
                described[label] = name, number
                calls[label] = partial(call, label, number, search)
        try:
            timings = interleave(calls, max(2, rounds // _SEARCH), progress)
        finally:
            torch.set_num_threads(threads)
    rows = []
    for label, (name, number) in described.items():
        seconds = timings.quartiles(label)[1]
        stock_label = _label("fairseq", number)
        pairs = list(zip(hypotheses[stock_label], hypotheses[label], strict=True))
        rows.append(
            {
                "search": name,
                "threads": number,
                "beam": BEAM,
                "sentences": len(pairs),
                "different_hypotheses": sum(not torch.equal(*pair) for pair in pairs),
                "seconds": round(seconds, 3),
                "sentences_per_second": round(len(pairs) / seconds, 1),
                "ratio_to_fairseq": _rounded(timings.ratios(label, stock_label)),
                **timings.rounds,
            }
        )
    return rows


def _label(search: str, threads: int) -> str:
    return f"{search}, {threads} threads"


def _our_searches(loaded: Any) -> dict[str, Callable[[], list[Tensor]]]:
    """The evaluation's search, and the same without compiled kernels."""
    from normexp.evaluation.scores import translate

    def ours() -> list[Tensor]:
        return translate(loaded, "test", BEAM, 1.0, MAX_TOKENS, progress=False)

    def plain() -> list[Tensor]:
        chosen = chosen_kernels()
        use_kernels("plain")
        try:
            return ours()
        finally:
            use_kernels(chosen)

    return {"ours": ours, "ours, plain torch": plain}


@torch.no_grad()
def _as_fairseq_generate(task: Any, model: nn.Module, device: torch.device) -> list[Tensor]:
    """Best hypotheses in the order of the corpus, as fairseq-generate finds them."""
    from fairseq import utils
    from fairseq.dataclass.configs import GenerationConfig

    generator = task.build_generator([model], GenerationConfig(beam=BEAM))
    iterator = task.get_batch_iterator(
        dataset=task.dataset("test"),
        max_tokens=MAX_TOKENS,
        max_positions=utils.resolve_max_positions(task.max_positions(), model.max_positions()),
    ).next_epoch_itr(shuffle=False)
    best: dict[int, Tensor] = {}
    for sample in iterator:
        moved = utils.move_to_cuda(sample) if device.type == "cuda" else sample
        hypotheses = task.inference_step(generator, [model], moved)
        for sentence, beams in zip(sample["id"].tolist(), hypotheses, strict=True):
            best[sentence] = beams[0]["tokens"].int().cpu()
    return [best[sentence] for sentence in sorted(best)]


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 3) for value in values]
