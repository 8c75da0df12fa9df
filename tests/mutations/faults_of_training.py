"""Faults in training: the loop, resuming, signals, ranks, divergence, diagnostics."""

from fault import Fault

RESUMED = ("runs/test_runs::test_killed_run_resumes_as_if_nothing_had_happened",)
TWO_RANKS = ("training/test_distributed::test_two_ranks_equal_two_batches_per_update",)
LOCAL = ("training/test_distributed::test_local_statistics_are_pooled_where_they_are_saved",)
KILLED_RANKS = ("training/test_distributed::test_killed_ranks_resume_as_if_nothing_had_happened",)
SIGNALS = ("training/test_preemption",)
DIAGNOSTICS = ("training/test_diagnostics",)
DIVERGENCE = ("training/test_survival_of_divergence",)
IN_VALIDATION = ("training/test_divergence_in_validation",)

TRAINING = [
    Fault(
        "training/peak_memory.py",
        '_RESET_PEAK = "5"',
        '_RESET_PEAK = "1"',
        "a run's record has the peak of an earlier run's memory",
        ("training/test_peak_memory",),
    ),
    Fault(
        "training/loop.py",
        "self.ema.update_freq_counter = updates % self.cfg.ema.ema_update_freq",
        "pass",
        "a resumed run averages its weights after other updates",
        ("training/test_moving_average",),
    ),
    Fault(
        "training/finetuning.py",
        "if one != other:",
        "if False:",
        "a run begins with the weights of a model with other norms",
        ("training/test_finetuning",),
    ),
    Fault(
        "training/loop.py",
        "fairseq_cfg.checkpoint.finetune_from_model = None",
        "pass",
        "fairseq looks for a checkpoint beside the donor",
        ("training/test_finetuning",),
    ),
    Fault(
        "training/loop.py",
        "self.lr_step(observed.num_epochs, extra_state",
        "(lambda *_: None)(observed.num_epochs, extra_state",
        "a resumed run forgets the learning rate's step at the end of an epoch",
        RESUMED,
    ),
    Fault(
        "training/loop.py",
        "metrics.truncate_after(step)",
        "pass",
        "a resumed run logs updates twice",
        RESUMED,
    ),
    Fault(
        "training/loop.py",
        "follow_loss_scale(self.get_model(), changed / scale)",
        "follow_loss_scale(self.get_model(), scale / changed)",
        "nu follows the loss scale in the wrong direction",
        ("training/test_loss_scale_of_runs",),
    ),
    Fault(
        "training/loop.py",
        "ended = fairseq_train.should_stop_early(fairseq_cfg, loss)",
        "pass",
        "early stopping starts anew after an interruption",
        ("runs/test_runs::test_early_stopping_survives_an_interruption",),
    ),
    Fault(
        "training/resume.py",
        "return updates >= (cfg.optimization.max_update",
        "return updates > (cfg.optimization.max_update",
        "a finished training does one more update",
        ("training/test_resume",),
    ),
    Fault(
        "training/preemption.py",
        "if number and not at_end:",
        "if number:",
        "a signal in the last update of an epoch loses its end",
        SIGNALS,
    ),
    Fault(
        "training/preemption.py",
        "distributed.all_reduce(number, distributed.ReduceOp.MAX)",
        "pass",
        "one rank stops, the other goes on",
        SIGNALS,
    ),
    Fault(
        "training/preemption.py",
        'return shown.stdout.strip() == "RUNNING"',
        "return True",
        "a cancelled job is requeued",
        SIGNALS,
    ),
    Fault(
        "training/preemption.py",
        "_state.leaving = True  #",
        "_state.leaving = False  #",
        "a second signal cuts the way out short",
        SIGNALS,
    ),
    Fault(
        "training/process_group.py",
        "15000 + step % 15000",
        "15000",
        "two steps of one node share a port",
        ("training/test_process_group",),
    ),
    Fault(
        "training/process_group.py",
        'if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "RANK" not in environment:',
        'if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:',
        "torchrun within an srun step counts as ranks of the step",
        ("training/test_process_group",),
    ),
    Fault(
        "training/randomness.py",
        "seeds.masks(self.get_num_updates(), rank)",
        "seeds.masks(self.get_num_updates())",
        "all ranks draw the same dropout masks",
        KILLED_RANKS,
    ),
    Fault(
        "training/data_parallel.py",
        "size * 0,",
        "size,",
        "an empty batch counts in the gradient's average",
        ("training/test_distributed::test_two_ranks_average_over_sentences_as_one_does",),
    ),
    Fault(
        "training/data_parallel.py",
        "    average_statistics(model)\n",
        "    pass\n",
        "local statistics are not pooled for the checkpoint",
        LOCAL,
    ),
    Fault(
        "training/data_parallel.py",
        "dist.all_reduce(largest, dist.ReduceOp.MAX)",
        "pass",
        "ranks count different numbers of steps",
        LOCAL,
    ),
    Fault(
        "training/divergence.py",
        "(min if forward else max)(sites, key=self._order.index)",
        "min(sites, key=self._order.index)",
        "the last site of a backward pass is blamed",
        DIVERGENCE,
    ),
    Fault(
        "training/divergence.py",
        "[: 2 * num_batches + 1]",
        "[:2]",
        "only the first batch of an update is looked at",
        DIVERGENCE,
    ),
    Fault(
        "training/diagnostics.py",
        "moved / ((1 - kept) * unit)",
        "moved / unit",
        "distances shrink with alpha",
        DIAGNOSTICS,
    ),
    Fault(
        "training/diagnostics.py",
        'then.averages["var"].sum().sqrt() if name == "mean" else running.norm()',
        "running.norm()",
        "the distance of the mean is in units of the mean",
        DIAGNOSTICS,
    ),
    Fault(
        "training/loop.py",
        "patches.after_validations(fairseq_train, _check_validation)",
        "patches.after_validations(fairseq_train, lambda *_: None)",
        "a validation loss that is not a number goes unnoticed",
        IN_VALIDATION,
    ),
    Fault(
        "training/loop.py",
        "notes=warmups.notes(trainer.get_model())",
        "notes=[]",
        "a training within its warm-up is not marked",
        IN_VALIDATION,
    ),
    Fault(
        "training/randomness.py",
        'kwargs["seed"] = seeds.order(kwargs["epoch"]) - kwargs["epoch"]',
        "pass",
        "the orders of batches are fairseq's",
        ("training/test_seeds_of_runs",),
    ),
    Fault(
        "config/seeding.py",
        "value ^= value >> (BITS // 2)",
        "value |= value >> (BITS // 2)",
        "two updates share a seed",
        ("config/test_seeding",),
    ),
]
