"""The causality test finds a model that sees future tokens and clears one that does not."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.small_runs import composed, run_script, script_process
from torch import Tensor, nn

from normexp import pipeline
from normexp.corpora import prepare
from normexp.errors import UserError
from normexp.evaluation import causality
from normexp.evaluation.scores import LoadedModel, load_model
from normexp.runs.causality_record import load_causality_records
from normexp.runs.folder import open_run

WORDS = 8


class _Dictionary:
    nspecial = 4

    def __len__(self) -> int:
        return self.nspecial + WORDS

    def pad(self) -> int:
        return 1


class _Blocks:
    """Blocks of a random stream: input i + 1 is target i."""

    def __init__(self, lengths: list[int]):
        generator = torch.Generator().manual_seed(3)
        self.blocks = [torch.randint(4, 12, (n + 1,), generator=generator) for n in lengths]
        self.sizes = lengths

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> Tensor:
        return self.blocks[index]

    def collater(self, blocks: list[Tensor]) -> dict:
        stacked = torch.stack(blocks)
        return {"net_input": {"src_tokens": stacked[:, :-1]}, "target": stacked[:, 1:]}


class _Model(nn.Module):
    """Gives log-probabilities by rule: `probability` to the token `offset` places on."""

    def __init__(self, offset: int, probability: float):
        super().__init__()
        self.offset, self.probability = offset, probability

    def forward(self, tokens: Tensor, src_lengths: None) -> Tensor:
        rest = (1 - self.probability) / (WORDS + 3)
        p = torch.full((*tokens.shape, WORDS + 4), rest)
        shifted = tokens.roll(-self.offset, dims=1)
        p.scatter_(2, shifted.unsqueeze(2), self.probability)
        if self.offset > 0:
            p[:, -self.offset :] = 1 / (WORDS + 4)
        return p.log()

    def get_normalized_probs(self, output: Tensor, log_probs: bool) -> Tensor:
        assert log_probs
        return output


def _loaded(model: nn.Module, lengths: list[int]) -> LoadedModel:
    task = SimpleNamespace(
        datasets={"test": None},
        dataset=lambda split: _Blocks(lengths),
        source_dictionary=_Dictionary(),
    )
    return LoadedModel(model, task, None, torch.device("cpu"))


def test_a_model_that_reads_the_answer_is_found_out() -> None:
    """It gives 0.9 to the very target, which is its input one place on."""
    loaded = _loaded(_Model(offset=1, probability=0.9), [6] * 10 + [3])
    sensitivity = causality.future_sensitivity(loaded, "test", segments=10)
    assert sensitivity.sees_future
    # only the position before the cut can answer, and does unless the random token is the same
    assert 0 < sensitivity.changed < 0.5
    assert sensitivity.largest == pytest.approx(math.log(0.9 / (0.1 / 11)), rel=1e-5)
    perplexity = causality.perplexity_by_future(loaded, "test", segments=10)
    assert perplexity.tokens == 60  # whole blocks only
    per_block = 5 * -math.log(0.9) + math.log(12)
    assert perplexity.visible == pytest.approx(math.exp(per_block / 6), rel=1e-5)
    assert perplexity.hidden == pytest.approx(
        math.exp((5 * -math.log(0.1 / 11) + math.log(12)) / 6), rel=1e-5
    )
    assert perplexity.visible < 2 < perplexity.random < perplexity.hidden


def test_tokens_are_replaced_within_the_bands_of_an_adaptive_input() -> None:
    """Otherwise the size of each band's product changes, and with it the last bits of all."""
    seen: list[Tensor] = []

    class Recording(_Model):
        decoder = SimpleNamespace(embed_tokens=SimpleNamespace(cutoff=[7, 9, 12]))

        def forward(self, tokens: Tensor, src_lengths: None) -> Tensor:
            seen.append(tokens)
            return super().forward(tokens, src_lengths)

    causality.future_sensitivity(_loaded(Recording(0, 0.9), [40]), "test", cuts=50)
    before, *changed = (torch.bucketize(tokens, torch.tensor([6, 8])) for tokens in seen)
    assert len(changed) == 50 and before.unique().tolist() == [0, 1, 2]
    assert all(torch.equal(before, other) for other in changed)
    assert len({tuple(tokens[0].tolist()) for tokens in seen}) > 45
    assert min(int(tokens.min()) for tokens in seen) >= 4


def test_a_model_that_looks_back_is_cleared() -> None:
    loaded = _loaded(_Model(offset=-1, probability=0.9), [6] * 10)
    sensitivity = causality.future_sensitivity(loaded, "test")
    # roll wraps round: position 0 sees the last one, as an off-by-one in a mask would have it
    assert sensitivity.sees_future
    loaded = _loaded(_Model(offset=0, probability=0.9), [6] * 10)
    sensitivity = causality.future_sensitivity(loaded, "test")
    assert (sensitivity.largest, sensitivity.mean, sensitivity.changed) == (0, 0, 0)
    perplexity = causality.perplexity_by_future(loaded, "test")
    assert (
        perplexity.visible == pytest.approx(perplexity.random) == pytest.approx(perplexity.hidden)
    )


def test_blocks_of_one_token_are_refused() -> None:
    with pytest.raises(UserError, match="no block of two tokens"):
        causality.future_sensitivity(_loaded(_Model(0, 0.9), [1, 1]), "test")


@pytest.mark.parametrize("attention", ["published", "causal"])
def test_whether_a_trained_model_sees_future_tokens_is_measured_and_recorded(
    attention: str, overrides, tmp_path: Path, data_dir: Path
) -> None:
    """From training to the record, and the command on the run and on the bare checkpoint."""
    settings = [
        *overrides("toy_language_model", "model=tensorized_ptb", "norm=power"),
        f"fairseq.model.attention={attention}",
        "fairseq.task.tokens_per_sample=16",
        "fairseq.optimization.lr=[0.02]",
        "fairseq.model.decoder_head_dim=8",
    ]
    record = pipeline.run(composed(*settings))
    published = attention == "published"
    assert record.sees_future_tokens is published
    folder = next((tmp_path / "results/runs/toy_language_model").iterdir())
    assert json.loads((folder / "record.json").read_text())["sees_future_tokens"] is published

    corpus = prepare("toy_language_model", data_dir)
    checkpoint = sorted((folder / "checkpoints").glob("*.pt"))[-1]
    perplexity = causality.perplexity_by_future(
        load_model(checkpoint, corpus.data_bin, cpu=True), "valid", 8
    )
    if published:
        assert abs(perplexity.visible - perplexity.hidden) > 1e-3 * perplexity.visible
    else:
        assert perplexity.visible == pytest.approx(perplexity.random, rel=1e-5)
        assert perplexity.visible == pytest.approx(perplexity.hidden, rel=1e-5)

    shown = run_script("audit.py", str(folder), "--segments", "4", "--cpu")
    assert shown.returncode == (2 if published else 0), shown.stderr
    assert f"sees future tokens                              │ {'yes' if published else 'no'}" in (
        shown.stdout
    )
    (path,) = load_causality_records(tmp_path / "results")
    assert path == tmp_path / "results/causality/toy_language_model/PN-seed1.json"
    causality_record = load_causality_records(tmp_path / "results")[path]
    assert causality_record.sees_future_tokens is published
    assert (causality_record.config_hash, causality_record.blocks) == (record.config_hash, 4)
    assert causality_record.command == (
        "python scripts/audit.py results/own/runs/toy_language_model/PN-seed1 "
        "--split test --segments 4 --seed 0 --cpu"
    )
    # A folder is not always named as the record is, which an evaluation of one's own renames.
    moved = folder.rename(folder.with_name("PN-elsewhere"))
    shown = run_script("audit.py", str(moved), "--segments", "4", "--cpu")
    again = load_causality_records(tmp_path / "results")[path]
    assert "Warning" not in shown.stderr  # torch's and fairseq's, about each other
    assert again.command.startswith("python scripts/audit.py results/own/runs/toy_language_model/")
    assert "/PN-elsewhere --split" in again.command
    checkpoint = moved / "checkpoints" / checkpoint.name
    shown = run_script(
        "audit.py", str(checkpoint), "--data", str(corpus.data_bin), "--segments", "2", "--cpu"
    )
    assert shown.returncode == (2 if published else 0), shown.stderr


def test_the_script_says_what_it_needs(tmp_path: Path) -> None:
    shown = run_script("audit.py", str(tmp_path / "no.pt"))
    assert shown.returncode == 1 and "no.pt does not exist" in shown.stderr
    (tmp_path / "no.pt").write_text("")
    shown = run_script("audit.py", str(tmp_path / "no.pt"))
    assert shown.returncode == 1 and "needs --data" in shown.stderr
    (tmp_path / "no.pt").unlink()
    shown = run_script("audit.py", str(tmp_path / "no.pt"), "--data", str(tmp_path))
    assert shown.returncode == 1 and "no dict.txt" in shown.stderr
    (tmp_path / "dict.txt").write_text("a 1\n")
    shown = run_script("audit.py", str(tmp_path / "no.pt"), "--data", str(tmp_path))
    assert shown.returncode == 1 and "there is no checkpoint" in shown.stderr
    assert "Traceback" not in shown.stderr


def test_an_error_is_one_line(tmp_path: Path) -> None:
    """fairseq shows notes of its own when it is imported."""
    shown = script_process("audit.py", str(tmp_path / "no.pt"))
    assert shown.returncode == 1 and shown.stderr.count("\n") == 1, shown.stderr


@pytest.mark.parametrize("script", ["audit.py", "evaluate.py"])
def test_a_run_folder_in_use_is_left_alone(overrides, script: str) -> None:
    """Both write into it: an average of checkpoints, translations."""
    settings = composed(*overrides("toy_language_model"))
    with open_run(settings) as folder:

        def files() -> dict[Path, int]:
            found = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}
            return {path: time for path, time in found.items() if path.name != ".lock"}

        before = files()
        done = run_script(script, str(settings.run_dir))
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "in use by another process" in done.stderr
        assert files() == before
    done = run_script(script, str(settings.run_dir))
    assert done.returncode == 1 and "there is no checkpoint" in done.stderr
