"""With `layer` at every site the models are fairseq's own, to the last bit."""

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import tasks

UPDATES = 20
TRANSLATION = (
    "--encoder-layers 2 --decoder-layers 2 --encoder-embed-dim 32 --decoder-embed-dim 32 "
    "--encoder-ffn-embed-dim 48 --decoder-ffn-embed-dim 48 "
    "--encoder-attention-heads 4 --decoder-attention-heads 4 --share-all-embeddings "
    "--dropout 0.3 --attention-dropout 0.1 --activation-dropout 0.1 "
    "--criterion label_smoothed_cross_entropy --label-smoothing 0.1"
)
PRE_NORM = "--encoder-normalize-before --decoder-normalize-before"
LANGUAGE_MODEL = (
    "--task language_modeling --decoder-layers 2 --decoder-embed-dim 32 --decoder-input-dim 32 "
    "--decoder-output-dim 32 --decoder-ffn-embed-dim 48 --decoder-attention-heads 4 "
    "--dropout 0.3 --activation-dropout 0.1 --tokens-per-sample 12 --max-target-positions 64"
)
TIED = "--share-decoder-input-output-embed --criterion cross_entropy"
ADAPTIVE = (
    "--adaptive-input --adaptive-input-cutoff 8,16 --adaptive-softmax-cutoff 8,16 "
    "--adaptive-softmax-dropout 0.2 --tie-adaptive-weights --tie-adaptive-proj "
    "--decoder-normalize-before --criterion adaptive_loss --ddp-backend legacy_ddp"
)


def _train_and_search(config: Any, length: int) -> dict[str, Any]:
    """Train UPDATES updates with dropout, then search the first batch with beam 4."""
    torch.manual_seed(7)
    task = tasks.setup_task(config.task)
    task.load_dataset("train")
    model, criterion = task.build_model(config.model), task.build_criterion(config.criterion)
    iterator = task.get_batch_iterator(task.dataset("train"), max_tokens=60, seed=3)
    batches = list(iterator.next_epoch_itr(shuffle=True))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for batch in itertools.islice(itertools.cycle(batches), UPDATES):
        loss, sample_size, _ = criterion(model.train(), batch)
        optimizer.zero_grad()
        (loss / sample_size).backward()
        optimizer.step()
        losses.append(loss.detach())
    # fairseq's adaptive softmax keeps a dummy buffer of uninitialised memory.
    state = {k: v.clone() for k, v in model.state_dict().items() if "_float_tensor" not in k}
    generation = argparse.Namespace(beam=4, max_len_a=0, max_len_b=length)
    generator = task.build_generator([model.eval()], generation)
    found = task.inference_step(generator, [model], batches[0])
    return {
        "losses": losses,
        "state": state,
        "parameters": [name for name, _ in model.named_parameters()],
        "tokens": [hypothesis["tokens"] for beam in found for hypothesis in beam],
        "scores": [hypothesis["positional_scores"] for beam in found for hypothesis in beam],
        "random": torch.get_rng_state(),
    }


CRITERION = {False: "--criterion ", True: "--criterion normexp_"}


@pytest.mark.parametrize(
    ("stock", "ours", "flags"),
    [
        ("transformer", "normexp_transformer", f"{TRANSLATION} {PRE_NORM}"),
        ("transformer", "normexp_transformer", TRANSLATION),
        ("transformer_lm", "normexp_transformer_lm", f"{LANGUAGE_MODEL} {TIED}"),
        (
            "transformer_lm",
            "normexp_transformer_lm",
            f"{LANGUAGE_MODEL} {TIED} --decoder-normalize-before",
        ),
        ("transformer_lm", "normexp_transformer_lm", f"{LANGUAGE_MODEL} {ADAPTIVE}"),
    ],
    ids=["translation-pre", "translation-post", "lm-post", "lm-pre", "lm-adaptive"],
)
def test_equals_stock_model_to_the_last_bit(
    stock: str,
    ours: str,
    flags: str,
    command_line_config: Callable[..., Any],
    translation_data: Path,
    language_model_data: Path,
) -> None:
    is_lm = stock.endswith("lm")
    data = str(language_model_data if is_lm else translation_data)

    def run(arch: str) -> dict[str, Any]:
        # normexp_adaptive_loss differs from fairseq's by intent (test_tensorized.py)
        own_criterion = arch == ours and "adaptive_loss" not in flags
        with_ours = flags.replace("--criterion ", CRITERION[own_criterion])
        config = command_line_config(data, "--arch", arch, *with_ours.split())
        return _train_and_search(config, length=20 if is_lm else 10)

    expected, result = run(stock), run(ours)

    assert result["parameters"] == expected["parameters"]
    assert list(result["state"]) == list(expected["state"])
    for part in ("losses", "tokens", "scores"):
        assert len(result[part]) == len(expected[part]) > 0
        assert all(map(torch.equal, result[part], expected[part])), part
    for name, value in expected["state"].items():
        assert torch.equal(result["state"][name], value), name
    assert torch.equal(result["random"], expected["random"])
    assert result["losses"][-1] != result["losses"][0]  # the comparison is of something
