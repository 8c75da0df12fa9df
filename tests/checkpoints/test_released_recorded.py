"""The recorded checkpoints translate as in the authors' code, and training can continue."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from fairseq_cli import train
from omegaconf import OmegaConf
from support.authors_format import GOLDEN, RECORDED

import normexp.fairseq_plugin  # noqa: F401  (registers the models)
from normexp.checkpoints import store
from normexp.checkpoints.released import import_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
PLUGIN = REPOSITORY / "normexp" / "fairseq_plugin"


def load(path: Path) -> torch.nn.Module:
    """Load the model as fairseq's tools do, in eval mode."""
    words = Dictionary.load(str(GOLDEN / "dict.de.txt"))
    task = TranslationTask(TranslationConfig(), words, words)
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)], task=task)
    return model.eval()


@pytest.mark.parametrize("name", RECORDED)
def test_logits_equal_the_recorded_ones(name: str, imported: dict[str, Path]) -> None:
    golden = np.load(GOLDEN / f"{name}_logits.npz", allow_pickle=False)
    recorded = {key: torch.from_numpy(golden[key]) for key in golden.files}
    batch = [recorded[key] for key in ("src_tokens", "src_lengths", "prev_output_tokens")]
    # In float64, so that the rounding of the recorded float32 computation is the only one.
    with torch.no_grad():
        logits, _ = load(imported[name]).double()(*batch)
    torch.testing.assert_close(logits, recorded["logits"].double(), rtol=0, atol=1e-5)


def lines(text: str, letter: str) -> dict[int, list[str]]:
    found = re.findall(rf"^{letter}-(\d+)\t(.*)$", text, re.M)
    return {int(number): rest.split("\t") for number, rest in found}


@pytest.mark.parametrize("name", RECORDED)
def test_stock_generate_gives_the_recorded_translations(
    name: str, imported: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    tool = Path(sys.executable).parent / "fairseq-generate"
    flags = "--beam 5 --max-tokens 4000 --required-batch-size-multiple 1 --num-workers 0 --cpu"
    command = [tool, data, "--user-dir", PLUGIN, "--path", imported[name], *flags.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr

    recorded = (GOLDEN / f"{name}.gen.txt").read_text(encoding="utf-8")
    assert len(lines(recorded, "H")) == 200
    for letter in "ST":
        assert lines(done.stdout, letter) == lines(recorded, letter)
    ours, theirs = lines(done.stdout, "H"), lines(recorded, "H")
    assert {i: words for i, (_, words) in ours.items()} == {i: w for i, (_, w) in theirs.items()}
    for i, (score, _) in theirs.items():  # natural logarithms there, to base 2 here
        assert float(ours[i][0]) * math.log(2) == pytest.approx(float(score), abs=1e-5)
    bleu = re.compile(r"BLEU4 = .*")
    assert bleu.search(done.stdout)[0] == bleu.search(recorded)[0]


def test_final_encoder_norm_keeps_its_own_warmup(imported: dict[str, Path]) -> None:
    encoder = load(imported["power_power_layer_layer"]).encoder
    for layer in encoder.layers:
        for norm in (layer.self_attn_layer_norm, layer.final_layer_norm):
            assert (norm.warmup_steps, norm.num_groups, int(norm.step)) == (150, 4, 900)
    final = encoder.layer_norm
    assert (final.warmup_steps, final.num_groups, int(final.step)) == (1000, 4, 900)


@pytest.mark.parametrize("name", RECORDED)
def test_result_holds_plain_data_and_averages(name: str, imported: dict[str, Path]) -> None:
    path = imported[name]
    assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == []
    state = store.load(path)
    average = store.average([path, path])["model"]
    assert all(torch.equal(average[key], value) for key, value in state["model"].items())
    assert state["optimizer_history"][-1]["num_updates"] == 900
    assert "last_optimizer_state" not in state and "train_meters" not in state["extra_state"]
    task = state["cfg"]["task"]
    assert (task["_name"], task["source_lang"], task["target_lang"]) == ("translation", "de", "en")


def test_summary_tells_what_was_found(tmp_path: Path) -> None:
    source = GOLDEN / "power_power_layer_layer.pt"
    summary = import_checkpoint(source, tmp_path / "out.pt")
    for part in (
        "transformer_iwslt_de_en_v2, 2 + 2 layers, dictionaries of 128 and 128 words",
        "900 updates, validation loss 1.78\n",
        "warmup_steps=150, num_groups=4) at encoder_attention, encoder_ffn\n",
        "warmup_steps=1000, num_groups=4) at encoder_final\n",
        "layer (eps=1e-05) at decoder_attention, decoder_cross, decoder_ffn, decoder_final\n",
        "left behind  optimizer state, training meters",
    ):
        assert part in summary
    assert "not finite" not in summary


@pytest.mark.parametrize("way", ["finetune_from_model", "restore_file"])
@pytest.mark.parametrize("name", RECORDED)
def test_training_goes_on(
    name: str,
    way: str,
    imported: dict[str, Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The best loss so far is an attribute of fairseq's function: reset it between trainings.
    monkeypatch.delattr(checkpoint_utils.save_checkpoint, "best", raising=False)
    before = store.load(imported[name])
    config = OmegaConf.create(before["cfg"])
    config.task.data = str(data)
    config.common.cpu = True
    config.dataset.update({"max_tokens": 400, "num_workers": 0})
    config.dataset.required_batch_size_multiple = 1
    config.optimization.max_update = 2
    config.lr_scheduler.warmup_updates = 1
    config.checkpoint.update({"save_dir": str(tmp_path), way: str(imported[name])})
    train.main(config)

    after = store.load(tmp_path / "checkpoint_last.pt")
    assert after["optimizer_history"][-1]["num_updates"] == 2
    assert after["model"].keys() == before["model"].keys()
    steps = {key: int(value) for key, value in after["model"].items() if key.endswith(".step")}
    assert len(steps) == 5 and set(steps.values()) == {902}
    for key, value in after["model"].items():
        moved = not torch.equal(value, before["model"][key])
        assert moved or key.endswith(".version"), key
        if "running" in key or key.endswith(".weight"):
            # Two updates do not lead far from a trained model, but far from a new one.
            torch.testing.assert_close(value, before["model"][key], rtol=0.3, atol=0.3)
    # It knows the language already: the loss of a new model would be log2(128) = 7 and more.
    assert after["extra_state"]["val_loss"] < 4
