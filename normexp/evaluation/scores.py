"""Evaluation of a checkpoint: BLEU for translation, perplexity for language models.

Every function checks that it scored exactly the sentences or tokens of the split: fairseq's own
tools leave out what does not fit and report a score all the same.
"""

import logging
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from tqdm import tqdm

from normexp.checkpoints import store
from normexp.config.settings import EvaluationSettings, RunSettings, window_stride
from normexp.corpora import PreparedCorpus
from normexp.errors import UserError
from normexp.evaluation import beam_search, fairseq_search, sliding_window, translations
from normexp.runs.folder import RunFolder
from normexp.runs.perplexity import perplexity

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A trained model ready to be evaluated, with fairseq's task and training configuration."""

    model: Any
    task: Any
    cfg: Any
    device: torch.device


def load_model(checkpoint: Path, data_bin: Path, cpu: bool = False) -> LoadedModel:
    """Build the model of a checkpoint, on the GPU where there is one.

    The task's settings (tokens_per_sample among them) come from the checkpoint. Raises UserError
    for a missing or damaged checkpoint, and for one whose configuration and weights do not fit.
    """
    from fairseq import checkpoint_utils

    from normexp.fairseq_plugin.patches import preloaded

    state = store.load(checkpoint)
    try:
        with preloaded(state):
            models, cfg, task = checkpoint_utils.load_model_ensemble_and_task(
                [str(checkpoint)], arg_overrides={"data": str(data_bin)}
            )
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError) as error:
        raise UserError(_misfit(checkpoint, error)) from error
    except RuntimeError as error:
        if "state_dict" not in str(error):
            raise
        raise UserError(_misfit(checkpoint, error)) from error
    device = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
    return LoadedModel(models[0].eval().to(device), task, cfg, device)


def _misfit(checkpoint: Path, error: Exception) -> str:
    reason = textwrap.shorten(str(error), 300) or type(error).__name__
    return f"{checkpoint}: its configuration and weights do not make up a model: {reason}"


def load_evaluated(
    settings: RunSettings, folder: RunFolder, corpus: PreparedCorpus, cpu: bool = False
) -> tuple[LoadedModel, str]:
    """Load the model of a run that its settings evaluate, and say which checkpoint it is of.

    settings.evaluation.checkpoint selects the best epoch or averages the last ones. Raises
    `store.Lost` where checkpoints that training wrote are missing or damaged.
    """
    path, selected = store.select(
        folder.checkpoints,
        settings.evaluation.checkpoint,
        settings.evaluation.average_last,
        settings.save_interval,
    )
    return load_model(path, corpus.data_bin, cpu or settings.on_cpu), selected


def load_split(
    loaded: LoadedModel, corpus: PreparedCorpus, split: str, max_tokens: int | None = None
) -> None:
    """Load the data of a split, which may be a further test set with a data folder of its own.

    Raises UserError that names a line with more tokens than the model, or max_tokens, allows.
    """
    from normexp.fairseq_plugin.long_lines import refuse_long_lines

    limit = max_tokens, "evaluation.max_tokens"
    refuse_long_lines(loaded.cfg, split, *limit, corpus.data_bin_of(split))
    settings = loaded.task.cfg or loaded.task.args  # fairseq's older tasks have the latter
    folder, settings.data = settings.data, str(corpus.data_bin_of(split))
    try:
        loaded.task.load_dataset(split)
    finally:
        settings.data = folder


def folded(loaded: LoadedModel) -> LoadedModel:
    """Merge the norms of a model into linear layers. Raises UserError if that is impossible."""
    from normexp.fairseq_plugin.folding import fold_norms

    try:
        return replace(loaded, model=fold_norms(loaded.model))
    except ValueError as error:
        raise UserError(str(error)) from None


@torch.inference_mode()
def score(loaded: LoadedModel, split: str, max_tokens: int, progress: bool) -> tuple[float, int]:
    """Return the negative log-likelihood of a split in nats and its number of target tokens.

    Sentence ends count as tokens. Language models see the preceding tokens of the same block of
    tokens_per_sample only. Raises UserError when the tokens scored are not those of the split.
    """
    samples = _batches(loaded, split, max_tokens, f"{split}: perplexity", progress)
    return _score(loaded, split, samples)


@torch.inference_mode()
def score_stream(
    loaded: LoadedModel,
    split: str,
    context_window: int,
    stride: int | None,
    max_tokens: int,
    progress: bool,
) -> tuple[float, int]:
    """Score a causal language model as `score` does, with context carried over between blocks.

    Every token is predicted from at least context_window earlier ones, as far as there are any, in
    windows that move on by `stride` tokens (None: as far as the model's tokens_per_sample allows).
    The result does not depend on the size of the batches, nor on how the text is cut into blocks.
    Raises UserError for impossible windows, too.
    """
    stride = window_stride(loaded.cfg.task.tokens_per_sample, context_window, stride)
    if split not in loaded.task.datasets:
        loaded.task.load_dataset(split)
    batches = sliding_window.stream_batches(
        loaded.task.dataset(split),
        loaded.task.source_dictionary.pad(),
        context_window,
        stride,
        max_tokens,
    )
    shown = tqdm(
        batches, f"{split}: windows", unit="batch", leave=False, disable=not progress or None
    )
    return _score(loaded, split, (_on_device(loaded, sample) for sample in shown))


def _score(loaded: LoadedModel, split: str, samples: Iterable[Any]) -> tuple[float, int]:
    criterion = _likelihood(loaded)
    total, tokens = 0.0, 0
    for sample in samples:
        _, _, logged = criterion(loaded.model, sample)
        total += float(logged["loss"])
        tokens += int(logged["ntokens"])
    expected = _num_target_tokens(loaded.task.dataset(split))
    if tokens != expected or tokens == 0:
        raise UserError(f"scored {tokens} tokens of {split}, which has {expected}")
    return total, tokens


def _likelihood(loaded: LoadedModel) -> Any:
    """Return the criterion whose loss is the likelihood, whatever the model was trained with."""
    trained = loaded.cfg.criterion
    if getattr(loaded.model.decoder, "adaptive_softmax", None) is not None:
        # fairseq asks for this backend, with one process too
        chosen = {"_name": "normexp_adaptive_loss", "ddp_backend": "legacy_ddp"}
    else:
        fused = bool(getattr(trained, "fused", False))
        chosen = {"_name": "normexp_cross_entropy", "fused": fused}
    criterion = loaded.task.build_criterion(OmegaConf.create({**chosen, "sentence_avg": False}))
    return criterion.eval().to(loaded.device)


@torch.inference_mode()
def translate(
    loaded: LoadedModel,
    split: str,
    beam: int,
    length_penalty: float,
    max_tokens: int,
    progress: bool,
) -> list[torch.Tensor]:
    """Translate a split by beam search; one hypothesis per sentence, in the corpus's order.

    Returns one tensor of target token ids per sentence, end of sentence included. Raises UserError
    when a sentence is missing.
    """
    described = f"{split}: beam search", progress
    reason = beam_search.why_not(loaded.model, loaded.task)
    if reason is None:
        most_sentences, num_threads = beam_search.division(loaded.device)
        searches = beam_search.searched(
            loaded.model,
            loaded.task.target_dictionary,
            _batches(loaded, split, max_tokens, *described, most_sentences),
            beam,
            length_penalty,
            num_threads,
        )
    else:
        fairseq_search.notice_once(reason)
        batches = _batches(loaded, split, max_tokens, *described)
        searches = fairseq_search.searched(loaded.model, loaded.task, batches, beam, length_penalty)
    hypotheses: dict[int, torch.Tensor] = {}
    for sample, found in searches:
        for sentence, tokens in zip(sample["id"].tolist(), found, strict=True):
            hypotheses[sentence] = tokens
    expected = len(loaded.task.dataset(split))
    if sorted(hypotheses) != list(range(expected)):
        raise UserError(f"translated {len(hypotheses)} sentences of {split}, which has {expected}")
    return [hypotheses[sentence] for sentence in range(expected)]


def evaluate_translation(
    loaded: LoadedModel,
    corpus: PreparedCorpus,
    settings: EvaluationSettings,
    hypotheses_dir: Path,
    progress: bool = True,
) -> dict[str, dict[str, float | str]]:
    """Return BLEU, tokenised and sacreBLEU, and perplexity per token of settings.splits.

    The translations are written to hypotheses_dir, see `translations.write`.
    """
    hypotheses_dir.mkdir(parents=True, exist_ok=True)
    metrics = {}
    for split in settings.splits:
        nll, tokens = score(loaded, split, settings.max_tokens, progress)
        found = translate(
            loaded,
            split,
            settings.beam,
            settings.length_penalty,
            settings.max_tokens,
            progress,
        )
        dataset = loaded.task.dataset(split)
        dictionary = loaded.task.target_dictionary
        hypotheses = [translations.to_text(dictionary, one, corpus.bpe) for one in found]
        references = [
            translations.to_text(dictionary, dataset[i]["target"], corpus.bpe, reference=True)
            for i in range(len(dataset))
        ]
        detokenised = translations.plain_text(corpus, hypotheses)
        raw = translations.raw_references(corpus, split, len(detokenised))
        translations.write(hypotheses_dir, split, hypotheses, detokenised)
        metrics[split] = translations.bleu_of(
            corpus, hypotheses, references, detokenised, raw, settings.compound_split
        ) | {
            "loss_per_token_nats": nll / tokens,
            "perplexity_per_token": perplexity(nll / tokens),
        }
    return metrics


def evaluate_language_model(
    loaded: LoadedModel,
    corpus: PreparedCorpus,
    settings: EvaluationSettings,
    causal: bool,
    progress: bool = True,
) -> dict[str, dict[str, float | str]]:
    """Return perplexity per token and per word of settings.splits.

    A token is a unit of the dictionary, a word a unit of the text before BPE; the end of every
    line counts as one of each. With a context_window there is also `streamed_*`, the same
    with context carried over (`score_stream`), unless the model is not causal.
    """
    streamed = settings.context_window > 0
    if streamed and not causal:
        logger.warning("the model sees future tokens: no perplexity with context carried over")
        streamed = False
    metrics = {}
    for split in settings.splits:
        nll, tokens = score(loaded, split, settings.max_tokens, progress)
        words = corpus.words(split) + corpus.sentences(split)
        if tokens != corpus.tokens(split):
            raise UserError(
                f"{split} has {tokens} tokens in {corpus.data_bin} but {corpus.tokens(split)} by "
                f"its manifest; remove {corpus.data_bin.parent} to prepare the corpus again"
            )
        metrics[split] = {
            "loss_per_token_nats": nll / tokens,
            "perplexity_per_token": perplexity(nll / tokens),
            "perplexity_per_word": perplexity(nll / words),
        }
        if streamed:
            windows = settings.context_window, settings.stride, settings.max_tokens
            nll, _ = score_stream(loaded, split, *windows, progress)
            metrics[split] |= {
                "streamed_loss_per_token_nats": nll / tokens,
                "streamed_perplexity_per_token": perplexity(nll / tokens),
                "streamed_perplexity_per_word": perplexity(nll / words),
            }
    return metrics


def _batches(
    loaded: LoadedModel,
    split: str,
    max_tokens: int,
    description: str,
    progress: bool,
    max_sentences: int | None = None,
) -> Iterator[Any]:
    from fairseq import utils

    task = loaded.task
    if split not in task.datasets:
        task.load_dataset(split)
    iterator = task.get_batch_iterator(
        dataset=task.dataset(split),
        max_tokens=max_tokens,
        max_sentences=max_sentences,
        max_positions=utils.resolve_max_positions(
            task.max_positions(), loaded.model.max_positions()
        ),
        ignore_invalid_inputs=False,
        required_batch_size_multiple=1,
    ).next_epoch_itr(shuffle=False)
    for sample in tqdm(iterator, desc=description, leave=False, disable=not progress or None):
        yield _on_device(loaded, sample)


def _on_device(loaded: LoadedModel, sample: Any) -> Any:
    from fairseq import utils

    return utils.move_to_cuda(sample) if loaded.device.type == "cuda" else sample


def _num_target_tokens(dataset: Any) -> int:
    # Translation: one size per sentence; language model: sizes of the blocks.
    sizes = dataset.tgt_sizes if hasattr(dataset, "tgt_sizes") else dataset.sizes
    return int(sizes.sum())
