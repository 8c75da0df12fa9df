"""fairseq's trainer with the seeds of `config.seeding` in the place of its own."""

from typing import Any

from normexp.config.seeding import Seeds


def seeded_trainer(seeds: Seeds, rank: int, trainer: type) -> type:
    """Return a subclass of fairseq's Trainer that seeds each update and each epoch's batches.

    Every rank draws masks of its own; the order of the batches, which the ranks share out, is the
    same on all. A seed depends on the update or epoch and on no draw before, so a resumed training
    goes on as if it had not been interrupted.
    """
    from fairseq import utils

    class SeededTrainer(trainer):
        def __init__(self, cfg: Any, task: Any, *args: Any, **kwargs: Any):
            super().__init__(cfg, task, *args, **kwargs)
            if seeds.are_separated:
                task.get_batch_iterator = self._with_own_order(task.get_batch_iterator)

        def _set_seed(self) -> None:
            utils.set_torch_seed(seeds.masks(self.get_num_updates(), rank))

        def _with_own_order(self, get_batch_iterator: Any) -> Any:
            """Return the task's function for which the training set has the order of the epoch."""

            def ordered(dataset: Any, *args: Any, **kwargs: Any) -> Any:
                if dataset is self.task.datasets.get(self.cfg.dataset.train_subset):
                    # An iterator serves one epoch, whose number it adds wherever it draws.
                    kwargs["seed"] = seeds.order(kwargs["epoch"]) - kwargs["epoch"]
                return get_batch_iterator(dataset, *args, **kwargs)

            return ordered

    return SeededTrainer
