"""Causality test: does a language model see the tokens that it predicts?

The test perturbs the inputs and compares the outputs, so it works for any language model of
fairseq.
"""

import argparse
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from normexp.config import terminal
from normexp.config.settings import FAIRSEQ_TASKS, RunSettings
from normexp.config.validation import validate
from normexp.corpora import prepare
from normexp.errors import UserError
from normexp.evaluation.scores import LoadedModel, load_evaluated, load_model, load_split
from normexp.paths import OWN_RESULTS, REPOSITORY
from normexp.runs import provenance, records
from normexp.runs.causality_record import CausalityRecord, write_causality_record
from normexp.runs.evidence import is_evidence
from normexp.runs.folder import RunFolder, hold
from normexp.runs.perplexity import perplexity

_LOG_PROBS_AT_A_TIME = 2**26


@dataclass(frozen=True)
class FutureSensitivity:
    """How much log-probabilities at positions <= i change with the tokens at positions > i.

    Attributes:
        positions: Number of positions compared.
        largest: Largest change of any log-probability, in nats.
        mean: Mean over the positions of the largest change at a position, in nats.
        changed: Share of the positions, 0 to 1, at which any log-probability changed at all.
    """

    positions: int
    largest: float
    mean: float
    changed: float

    @property
    def sees_future(self) -> bool:
        """True if any log-probability changed; a causal model gives exactly zero."""
        return self.changed > 0


@dataclass(frozen=True)
class PerplexityByFuture:
    """Perplexity per token of the same targets under three treatments of the future tokens.

    Attributes:
        tokens: Number of targets.
        visible: The inputs as they are.
        random: All inputs after the predicting position replaced by random tokens.
        hidden: All inputs after the predicting position replaced by padding.
    """

    tokens: int
    visible: float
    random: float
    hidden: float


def future_sensitivity(
    loaded: LoadedModel, split: str, segments: int = 16, cuts: int = 4, seed: int = 0
) -> FutureSensitivity:
    """Replace the inputs after random positions and compare the predictions up to them.

    segments: number of blocks drawn from the split; cuts: number of positions drawn per block.
    Position i predicts the token that is input i + 1. Raises UserError if the split has no block
    of two tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    positions, largest, total, changed = 0, 0.0, 0.0, 0
    with torch.inference_mode():
        for tokens, _ in _segments(loaded, split, segments, generator):
            before = _log_probs(loaded, tokens)
            for _ in range(cuts):
                cut = int(torch.randint(0, tokens.shape[1] - 1, (), generator=generator))
                other = _randomized(loaded, tokens, cut, generator)
                after = _log_probs(loaded, other)[:, : cut + 1]
                difference = (after - before[:, : cut + 1]).abs().amax(-1)
                positions += difference.numel()
                largest = max(largest, float(difference.max()))
                total += float(difference.sum())
                changed += int((difference > 0).sum())
    return FutureSensitivity(positions, largest, total / positions, changed / positions)


def perplexity_by_future(
    loaded: LoadedModel, split: str, segments: int = 16, seed: int = 0, progress: bool = False
) -> PerplexityByFuture:
    """Perplexity with the future tokens visible, replaced at random, and hidden.

    Every position of every drawn block is predicted three times: with the inputs of the ordinary
    evaluation, with all inputs after the position replaced by random tokens, and with them
    replaced by padding. The three perplexities of a causal model are equal. segments: number of
    blocks drawn from the split. Raises UserError if the split has no block of two tokens, and if
    the probabilities are not numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    sums, count = dict.fromkeys(("visible", "random", "hidden"), 0.0), 0
    with torch.inference_mode():
        for tokens, targets in tqdm(
            _segments(loaded, split, segments, generator),
            "causality test",
            total=segments,
            leave=False,
            disable=not progress or None,
        ):
            length = tokens.shape[1]
            at = torch.arange(length, device=tokens.device)
            # Row i of these batches is the block with everything after position i replaced.
            later = at > at[:, None]
            rows = tokens.expand(length, -1)
            noise = _random_tokens(loaded, rows.shape, generator).to(tokens.device)
            padding = loaded.task.source_dictionary.pad()
            own_targets = targets[0, :, None]
            sums["visible"] -= float(_log_probs(loaded, tokens)[0].gather(1, own_targets).sum())
            for treatment, replacement in (("random", noise), ("hidden", padding)):
                changed = torch.where(later, replacement, rows)
                for block in at.split(_rows_at_a_time(loaded, length)):
                    log_probs = _log_probs(loaded, changed[block])
                    own = log_probs[torch.arange(len(block), device=at.device), block]
                    sums[treatment] -= float(own.gather(1, own_targets[block]).sum())
            count += length
    if any(math.isnan(value) for value in sums.values()):
        raise UserError(f"the model's probabilities on {split} are not numbers: it has diverged")
    return PerplexityByFuture(
        count, **{name: perplexity(value / count) for name, value in sums.items()}
    )


def main(
    model: Path,
    data: Path | None,
    user_dir: Path | None,
    split: str,
    segments: int,
    seed: int,
    cpu: bool,
) -> FutureSensitivity:
    """Test a run folder, or a checkpoint with its binarized data, and print the result.

    A finished run also gets a causality record. Raises UserError if the model is no language
    model, its files are missing, the run folder is in use, or segments < 1.
    """
    if segments < 1:
        raise UserError(f"--segments={segments} must be at least 1")
    folder = RunFolder(model.absolute()) if model.is_dir() else None
    with hold(folder) if folder else nullcontext() as settings:
        if folder:
            validate(settings)
            corpus = prepare(
                settings.task.corpus, settings.data.dir, settings.data.local, splits=[split]
            )
            loaded, checkpoint = load_evaluated(settings, folder, corpus, cpu)
            load_split(loaded, corpus, split)
        else:
            loaded = _of_checkpoint(model, data, user_dir, cpu)
        if loaded.cfg.task._name not in FAIRSEQ_TASKS["language_model"]:
            raise UserError(f"{model} is no language model but a model for {loaded.cfg.task._name}")
        sensitivity = future_sensitivity(loaded, split, segments, seed=seed)
        perplexity = perplexity_by_future(loaded, split, segments, seed, progress=True)
        table = Table(title=f"{model}: {split}, {segments} blocks, seed {seed}", show_header=False)
        for name, value in (
            ("sees future tokens", "yes" if sensitivity.sees_future else "no"),
            ("positions affected by later tokens", f"{100 * sensitivity.changed:.1f} %"),
            ("largest change of a log-probability", f"{sensitivity.largest:.3g} nats"),
            ("mean largest change at a position", f"{sensitivity.mean:.3g} nats"),
            ("perplexity per token, future visible", f"{perplexity.visible:.2f}"),
            ("perplexity per token, future replaced at random", f"{perplexity.random:.2f}"),
            ("perplexity per token, future hidden", f"{perplexity.hidden:.2f}"),
        ):
            table.add_row(name, value)
        terminal.console().print(table)
        if folder and folder.record.is_file():
            options = f" --split {split} --segments {segments} --seed {seed}" + " --cpu" * cpu
            drawn = split, segments, seed, options
            print(
                "record:",
                _write_record(settings, folder, checkpoint, sensitivity, perplexity, *drawn),
            )
        return sensitivity


def _write_record(
    settings: RunSettings,
    folder: RunFolder,
    checkpoint: str,
    sensitivity: FutureSensitivity,
    perplexity: PerplexityByFuture,
    split: str,
    segments: int,
    seed: int,
    options: str,
) -> Path:
    """Write the causality record beside the run's record and return its path."""
    record = records.read_record(folder.record)
    # Folders of runs made before results/own existed say that their results are results/.
    results = OWN_RESULTS if is_evidence(settings.results_dir) else settings.results_dir
    of_run = records.record_path(results, record)
    path = results / "causality" / of_run.relative_to(results / "records")
    commit, dirty = provenance.code_version(REPOSITORY)
    tested = f"{record.task}/{folder.path.name}"  # one training may have records of evaluations
    result = CausalityRecord(
        task=record.task,
        label=record.label,
        seed=record.seed,
        config_hash=record.config_hash,
        checkpoint=checkpoint,
        split=split,
        blocks=segments,
        draw_seed=seed,
        sees_future_tokens=sensitivity.sees_future,
        changed=sensitivity.changed,
        largest_nats=sensitivity.largest,
        perplexity_visible=_finite(perplexity.visible),
        perplexity_random=_finite(perplexity.random),
        perplexity_hidden=_finite(perplexity.hidden),
        code_commit=commit,
        code_dirty=dirty,
        versions=provenance.package_versions(),
        command=f"python scripts/audit.py results/own/runs/{tested}{options}",
        finished_at=provenance.utc_now(),
    )
    write_causality_record(path, result)
    return path


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _of_checkpoint(path: Path, data: Path | None, user_dir: Path | None, cpu: bool) -> LoadedModel:
    from fairseq.utils import import_user_module

    if data is None and not path.exists():
        raise UserError(f"{path} does not exist; name a run folder or a checkpoint")
    if data is None:
        raise UserError(f"{path} needs --data, the folder of the binarized corpus")
    if not (data / "dict.txt").is_file():
        raise UserError(f"{data} holds no dict.txt; name the folder that fairseq-preprocess made")
    if user_dir is not None:
        import_user_module(argparse.Namespace(user_dir=str(user_dir)))
    return load_model(path, data, cpu)


def _segments(
    loaded: LoadedModel, split: str, segments: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks drawn without replacement: inputs (1, L) and targets (1, L), the longest there are."""
    task = loaded.task
    if split not in task.datasets:
        task.load_dataset(split)
    dataset = task.dataset(split)
    longest = max(dataset.sizes, default=0)
    if longest < 2:
        raise UserError(f"{split} has no block of two tokens")
    whole = [index for index in range(len(dataset)) if dataset.sizes[index] == longest]
    for choice in torch.randperm(len(whole), generator=generator)[:segments].tolist():
        sample = dataset.collater([dataset[whole[choice]]])
        yield (
            sample["net_input"]["src_tokens"].to(loaded.device),
            sample["target"].to(loaded.device),
        )


def _rows_at_a_time(loaded: LoadedModel, length: int) -> int:
    # A model with WikiText's vocabulary gives 86 MB of log-probabilities per block of 80 tokens.
    return max(1, _LOG_PROBS_AT_A_TIME // (length * len(loaded.task.source_dictionary)))


def _randomized(
    loaded: LoadedModel, tokens: Tensor, cut: int, generator: torch.Generator
) -> Tensor:
    # Within the bands of an adaptive input: it multiplies each band by a matrix of its own, and the
    # last bits of such a product depend on how many tokens of the band there are.
    decoder = getattr(loaded.model, "decoder", None)
    ends = getattr(getattr(decoder, "embed_tokens", None), "cutoff", None)
    dictionary = loaded.task.source_dictionary
    noise = torch.empty_like(tokens)
    first = dictionary.nspecial
    lowest = 0
    for end in ends or [len(dictionary)]:
        drawn = torch.randint(first, end, tokens.shape, generator=generator).to(tokens.device)
        noise = torch.where((tokens >= lowest) & (tokens < end), drawn, noise)
        first = lowest = end
    after = torch.arange(tokens.shape[1], device=tokens.device) > cut
    return torch.where(after, noise, tokens)


def _random_tokens(loaded: LoadedModel, shape: torch.Size, generator: torch.Generator) -> Tensor:
    dictionary = loaded.task.source_dictionary
    return torch.randint(dictionary.nspecial, len(dictionary), shape, generator=generator)


def _log_probs(loaded: LoadedModel, tokens: Tensor) -> Tensor:
    """(B, L) -> (B, L, vocabulary)."""
    output = loaded.model(tokens, src_lengths=None)
    return loaded.model.get_normalized_probs(output, log_probs=True)
