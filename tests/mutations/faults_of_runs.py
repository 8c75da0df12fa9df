"""Faults in the settings of runs, their records and folders, checkpoints and sweeps."""

from fault import Fault

IDENTITY = ("config/test_identity",)
CONFIGS = ("config/test_configs::test_bad_setting_is_named_before_any_work",)
RECORDS = ("runs/test_records",)
METRICS = ("runs/test_metrics_file",)
STORE = ("checkpoints/test_store", "checkpoints/test_recovery")
FOLDERS = ("runs/test_survival_of_folders",)
SWEEPS = ("sweeps/test_sweeps",)
FILES = ("test_files",)

RUNS = [
    Fault(
        "config/identity.py",
        "exclude=set(NOT_IN_IDENTITY), exclude_defaults=True",
        "exclude=set(NOT_IN_IDENTITY)",
        "a new setting at its default changes every hash",
        IDENTITY,
    ),
    Fault(
        "config/identity.py",
        "and not (name in NEUTRAL_OPTIONS and value == NEUTRAL_OPTIONS[name])",
        "",
        "an option at its neutral value changes the hash",
        IDENTITY,
    ),
    Fault(
        "config/identity.py",
        "sort_keys=True, separators",
        "separators",
        "the hash depends on the order of keys",
        RECORDS,
    ),
    Fault(
        "config/validation.py",
        "if adaptive_loss != adaptive_softmax:",
        "if adaptive_loss and not adaptive_softmax:",
        "an adaptive softmax with another loss is let through",
        CONFIGS,
    ),
    Fault(
        "config/validation.py",
        "if penalized and name == stock:",
        "if False:",
        "a criterion without the penalty of the norm is let through",
        CONFIGS,
    ),
    Fault(
        "config/validation.py",
        "if not any(end is not None and end > 0 for end in ends):",
        "if False:",
        "a run that would never end is let through",
        CONFIGS,
    ),
    Fault(
        "runs/records.py",
        "if isinstance(value, float) and not math.isfinite(value):",
        "if False:",
        "numbers that are not finite reach the record",
        RECORDS,
    ),
    Fault(
        "runs/records.py",
        "if path != (proper := record_path(results_dir, record)):",
        "if not (proper := record_path(results_dir, record)):",
        "a copied record counts twice",
        RECORDS,
    ),
    Fault(
        "runs/records.py",
        "if version != SCHEMA_VERSION:",
        "if version is None:",
        "a record of another schema is read",
        RECORDS,
    ),
    Fault(
        "runs/records.py",
        'if folder != "/":',
        "if False:",
        "paths of this machine are published",
        RECORDS,
    ),
    Fault(
        "runs/lookup.py",
        "if record.config_hash == config_hash(settings) else None",
        "if record else None",
        "the record of another configuration counts as done",
        SWEEPS,
    ),
    Fault(
        "runs/lookup.py",
        "or (folder.config.is_file() and not folder.record.is_file())",
        "",
        "a run killed between its two records counts as done",
        ("runs/test_survival_of_folders::test_killed_between_its_two_records",),
    ),
    Fault(
        "runs/lookup.py",
        'if found and found[1].status != "failed" else None',
        "if found else None",
        "a failed run is not tried again",
        ("runs/test_survival_of_folders::test_too_little_memory",),
    ),
    Fault(
        "runs/archive.py",
        "if earlier != config_hash:",
        "if False:",
        "the record of another configuration is overwritten",
        SWEEPS,
    ),
    Fault(
        "runs/folder.py",
        "lock.acquire(timeout=LOCK_SECONDS)",
        "pass",
        "two processes train in one folder",
        ("config/test_configs::test_run_folder_belongs_to_one_process",),
    ),
    Fault(
        "runs/folder.py",
        "while changed := folder.difference_from(settings):",
        'while changed := "":',
        "a folder of another configuration is trained on",
        SWEEPS,
    ),
    Fault(
        "runs/metrics_file.py",
        'if entry["step"] <= step',
        'if entry["step"] < step',
        "a resumed run loses the line of the update it resumes from",
        METRICS,
    ),
    Fault(
        "runs/metrics_file.py",
        'self._file = open(path, "a+b", buffering=0)  # noqa: SIM115\n        self._repair',
        'self._file = open(path, "a+b")  # noqa: SIM115\n        self._repair',
        "lines wait in a buffer that a kill throws away",
        METRICS,
    ),
    Fault(
        "runs/metrics_file.py",
        "self._file.truncate(end)",
        "pass",
        "a full disk leaves half a line",
        METRICS,
    ),
    Fault(
        "checkpoints/store.py",
        "if member is not None:",
        "if False:",
        "a flipped bit is loaded as a weight",
        (*STORE, *FOLDERS),
    ),
    Fault(
        "checkpoints/store.py",
        "weights_only=True",
        "weights_only=False",
        "a checkpoint can run code",
        (*STORE, "fairseq_plugin/test_checkpoint_types"),
    ),
    Fault(
        "checkpoints/store.py",
        "(total / len(paths))",
        "(total / (len(paths) + 1))",
        "the average divides by one too many",
        STORE,
    ),
    Fault(
        "checkpoints/store.py",
        "epoch_checkpoints(folder)[:average_last]",
        "epoch_checkpoints(folder)[-average_last:]",
        "the first epochs are averaged instead of the last",
        STORE,
    ),
    Fault(
        "checkpoints/recovery.py",
        "if best is None or updates > best[0]:",
        "if best is None or updates < best[0]:",
        "resumes from the checkpoint with the fewest updates",
        (*STORE, "runs/test_runs::test_damaged_last_checkpoint_costs_at_most_an_epoch"),
    ),
    Fault(
        "checkpoints/recovery.py",
        "if other != path and _updates(other) > limit:",
        "if False:",
        "checkpoints of a training that is repeated stay",
        (*STORE, *FOLDERS),
    ),
    Fault(
        "sweeps/run_status.py",
        "if folder.in_use():",
        "if False:",
        "a running run counts as interrupted",
        SWEEPS,
    ),
    Fault(
        "sweeps/slurm_queue.py",
        'if not line.startswith("srun: ")',
        "",
        "srun's line is shown instead of the job's own error",
        SWEEPS,
    ),
    Fault(
        "files.py",
        "fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        "what a living process is writing is removed",
        FILES,
    ),
    Fault(
        "tracking/bounded_calls.py",
        "            _end_service()\n",
        "",
        "a service of W&B that hangs holds the process at its exit",
        ("tracking/test_unresponsive",),
    ),
]
