"""What a sweep with an optimizer minimizes, such as one of hydra-optuna-sweeper."""

import math

from normexp.runs.records import Record


class RunFailed(Exception):
    """A run diverged or failed, and why has been printed: to Hydra's sweepers a failed trial."""


def objective(record: Record) -> float | None:
    """Return the validation loss of a complete run, in nats per target token; lower is better.

    It is that of the model that is evaluated, without label smoothing. With
    evaluation.splits=[test] it is the lowest of the training: nothing may be chosen by the test
    set. None where that is not known or not finite.
    """
    if "valid" in record.metrics:
        loss = record.metrics["valid"].get("loss_per_token_nats")
        losses = [loss] if isinstance(loss, int | float) else []
    else:
        losses = [loss for _, loss in record.curve]
    return min(filter(math.isfinite, losses), default=None)
