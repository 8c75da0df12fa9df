"""Sweeps on a SLURM cluster: hydra-submitit-launcher, extended by the status of runs.

Only what is missing is submitted, as one job array. The command waits for its jobs and ends with a
list of how every run stands. A job whose run fails ends with a status other than 0.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra_plugins.hydra_submitit_launcher import submitit_launcher
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

from normexp.config.departures import Usual
from normexp.config.settings import RunSettings
from normexp.errors import UserError
from normexp.runs.lookup import find_record
from normexp.sweeps import slurm_queue
from normexp.sweeps.objective import RunFailed, objective
from normexp.sweeps.run_status import status_of
from normexp.sweeps.slurm_queue import Job
from normexp.sweeps.status_table import print_statuses
from normexp.sweeps.sweep import settings_or_error

SHARED = {
    field.name for field in fields(BaseQueueConf)
}  # settings that submitit has on any cluster
POLL_SECONDS = (2, 30)  # at first and at last
THREADS = [
    "export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK",
    # From SLURM 22.05 on, srun does not take over --cpus-per-task from sbatch by itself.
    "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK",
]


def register() -> None:
    """Let Hydra use this launcher wherever SLURM is configured."""
    # Hydra accepts launchers of its own name space only, which an editable installation of this
    # project cannot extend; so the class answers to the name of the one it extends.
    name = f"{submitit_launcher.__name__}.{submitit_launcher.SlurmLauncher.__name__}"
    Plugins.instance().class_name_to_class[name] = SlurmLauncher


class SlurmLauncher(submitit_launcher.SlurmLauncher):
    """Submits the runs of a sweep that are missing, and waits for them."""

    def __call__(self, *args: Any) -> JobReturn:
        """Do one run in its job; exit with status 1 if it failed: Hydra keeps its exception."""
        if self.params.get("gpus_per_node"):
            _check_gpu()
        returned = super().__call__(*args)
        if returned.status is JobStatus.FAILED:
            sys.exit(1)
        return returned

    def checkpoint(self, *args: Any) -> Any:
        """Return what a requeued job does: the same again. Called by submitit on SLURM's signal.

        The submission is read back from its file, because the arguments here share state with
        Hydra, where fairseq has left its own configurations by now.
        """
        import submitit

        return submitit.helpers.DelayedSubmission.load(
            submitit.JobEnvironment().paths.submitted_pickle
        )

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Submit the missing runs, wait for them, and print the status of all.

        Returns for each run what `train.py` would: its objective, or the failure of one that is
        not done.
        """
        try:
            return self._launch(job_overrides, initial_job_idx)
        except UserError as error:
            sys.exit(f"error: {error}")

    def _launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        usual = Usual()
        composed = [self._composed(overrides, usual) for overrides in job_overrides]
        runs = []
        for overrides, settings in zip(job_overrides, composed, strict=True):
            if isinstance(settings, UserError):
                print(f"error: {settings}", file=sys.stderr, flush=True)
            else:
                runs.append((list(overrides), settings))
        results_dir = Path(self.config.results_dir)
        known = slurm_queue.jobs(results_dir)
        statuses = [status_of(settings, known) for _, settings in runs]
        missing = [
            run
            for run, status in zip(runs, statuses, strict=True)
            if not status.finished and status.state not in ("running", "waiting")
        ]
        left = len(runs) - len(missing)
        if left:
            say(f"{left} of {len(runs)} runs are done or under way already")
        if missing:
            self._wait_for(self._submit(missing))
        known = slurm_queue.jobs(results_dir)
        statuses = [status_of(settings, known) for _, settings in runs]
        print_statuses(statuses)
        return [
            self._returned(overrides, settings)
            for overrides, settings in zip(job_overrides, composed, strict=True)
        ]

    def _composed(self, overrides: Sequence[str], usual: Usual) -> RunSettings | UserError:
        loader = self.hydra_context.config_loader
        cfg = loader.load_sweep_config(self.config, list(overrides))
        choices = cfg.hydra.runtime.choices
        return settings_or_error(cfg, choices, filter_overrides(overrides), usual)

    def _returned(self, overrides: Sequence[str], settings: RunSettings | UserError) -> JobReturn:
        """Return the result of a run, or a failure if it is not done, from its record."""
        given = filter_overrides(overrides)
        found = None if isinstance(settings, UserError) else find_record(settings)
        if found and found[1].status == "complete":
            result, status = objective(found[1]), JobStatus.COMPLETED
        else:
            reason = settings if isinstance(settings, UserError) else found and found[1].reason
            result, status = RunFailed(str(reason or "not done")), JobStatus.FAILED
        return JobReturn(overrides=given, status=status, _return_value=result)

    def _submit(self, runs: list[tuple[list[str], RunSettings]]) -> dict[Path, Job]:
        import submitit  # here, because it is not needed for a single run

        settings = dict(self.params)
        folder = Path(settings.pop("submitit_folder")).absolute()
        retries = settings.pop("max_num_timeout")
        settings["setup"] = THREADS + (settings["setup"] or [])
        try:
            executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=retries)
            executor.update_parameters(
                **{key if key in SHARED else f"slurm_{key}": x for key, x in settings.items()}
            )
            submitted = executor.map_array(
                self,
                [overrides for overrides, _ in runs],
                ["hydra.sweep.dir"] * len(runs),
                range(len(runs)),
                [str(number) for number in range(len(runs))],
                [Singleton.get_state()] * len(runs),
            )
        except (RuntimeError, OSError) as error:
            raise UserError(f"SLURM does not take the jobs: {error}") from None
        jobs = {
            settings.run_dir.absolute(): Job(job.job_id, job.paths.stderr)
            for job, (_, settings) in zip(submitted, runs, strict=True)
        }
        slurm_queue.remember(Path(self.config.hydra.sweep.dir), jobs)
        for job, (overrides, _) in zip(submitted, runs, strict=True):
            say(f"  SLURM job {job.job_id}: {' '.join(filter_overrides(overrides))}")
        say(f"output of the jobs: {self.config.hydra.sweep.dir}/<job>/")
        return jobs

    def _wait_for(self, jobs: dict[Path, Job]) -> None:
        """Wait until no job is in the queue; ask again if SLURM does not answer."""
        pause, last = POLL_SECONDS
        ids = {job.id for job in jobs.values()}
        try:
            while (queue := slurm_queue.in_queue()) is None or ids & queue.keys():
                time.sleep(pause)
                pause = min(last, 1.1 * pause)
        except KeyboardInterrupt:
            arrays = sorted({job.split("_")[0] for job in ids})
            say(f"the jobs continue without this command; `scancel {' '.join(arrays)}` ends them")
            raise


def _check_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        sys.exit(
            f"error: this job has asked for a GPU, and PyTorch {torch.__version__} sees none: "
            "install PyTorch with CUDA (without a GPU at hand `make install` takes that for the "
            "CPU), or set hydra.launcher.gpus_per_node=null"
        )


def say(line: str) -> None:
    """Print one line on standard output, unbuffered."""
    print(line, flush=True)
