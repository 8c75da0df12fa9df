"""Beam search of the IWSLT14 model as the evaluation runs it."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from normexp.benchmarks.gpu import generated
from normexp.benchmarks.gpu.section import Row, device, timed
from normexp.benchmarks.gpu.updates import MODELS, TINY

BEAM, MAX_TOKENS, SENTENCES, LONGEST = 5, 8000, 500, 40
MOST_TARGET_TOKENS = 40  # an untrained model does not end its sentences
ROUNDS = 3


def rows(rehearsal: bool) -> Iterator[Row]:
    """Yield sentences and target tokens per second of LN, PN, and PN folded, in float32."""
    from normexp.evaluation.scores import LoadedModel, folded, translate

    model = MODELS["IWSLT14 small"]
    words = generated.dictionary(50 if rehearsal else model.vocabulary)
    sentences, longest = (4, 6) if rehearsal else (SENTENCES, LONGEST)
    pairs = generated.sentence_pairs(words, sentences, longest)

    def loaded(norm: str) -> LoadedModel:
        settings = generated.settings_of(
            f"+experiment={model.experiment}",
            f"norm={norm}",
            f"+fairseq.model.max_target_positions={MOST_TARGET_TOKENS}",
            *(TINY * rehearsal),
        )
        cfg = generated.fairseq_config(settings, stock=False, cpu=device().type == "cpu")
        task = generated.translation_task(cfg, words)
        task.datasets["test"] = pairs
        torch.manual_seed(1)
        built = task.build_model(cfg.model).eval().to(device())
        return LoadedModel(built, task, cfg, device())

    models = {"LN": loaded("layer"), "PN": loaded("power")}
    models["PN, folded"] = folded(models["PN"])
    found: dict[str, list[Any]] = {}

    def search(name: str) -> Callable[[], None]:
        def call() -> None:
            found[name] = translate(models[name], "test", BEAM, 1.0, MAX_TOKENS, progress=False)

        return call

    timings = timed({name: search(name) for name in models}, ROUNDS, rehearsal)
    for name in models:
        seconds = timings.quartiles(name)[1]
        tokens = sum(map(len, found[name]))
        yield {
            "model": name,
            "beam": BEAM,
            "sentences": len(found[name]),
            "sentences_per_second": round(len(found[name]) / seconds, 1),
            "tokens_per_second": round(tokens / seconds),
            "ratio_to_layer": [round(r, 3) for r in timings.ratios(name, "LN")],
            **timings.rounds,
        }
