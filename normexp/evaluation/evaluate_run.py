"""The evaluation of a whole run: every metric of every split that its settings ask for."""

from dataclasses import dataclass

from normexp.config.settings import RunSettings
from normexp.corpora import PreparedCorpus
from normexp.evaluation import causality, scores
from normexp.runs.folder import RunFolder
from normexp.runs.records import Metrics


@dataclass(frozen=True)
class Evaluated:
    """The result of evaluating a run.

    Attributes:
        metrics: By split, then by name.
        checkpoint: Which one was evaluated, such as "best".
        sees_future_tokens: Measured; None for a translation model.
    """

    metrics: dict[str, Metrics]
    checkpoint: str
    sees_future_tokens: bool | None


def evaluate_run(
    settings: RunSettings, folder: RunFolder, corpus: PreparedCorpus, fold: bool = False
) -> Evaluated:
    """Evaluate the model of a run folder.

    fold: merge its norms into linear layers first. Raises UserError where that is impossible.
    """
    evaluation = settings.evaluation
    loaded, checkpoint = scores.load_evaluated(settings, folder, corpus)
    if fold:
        loaded = scores.folded(loaded)
    for split in evaluation.splits:
        scores.load_split(loaded, corpus, split, evaluation.max_tokens)
    if corpus.kind == "translation":
        metrics = scores.evaluate_translation(loaded, corpus, evaluation, folder.hypotheses)
        return Evaluated(metrics, checkpoint, None)
    sees_future = causality.future_sensitivity(loaded, evaluation.splits[0]).sees_future
    metrics = scores.evaluate_language_model(loaded, corpus, evaluation, not sees_future)
    return Evaluated(metrics, checkpoint, sees_future)
