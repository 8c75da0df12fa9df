"""The W&B dashboard as code: a saved workspace that compares norms, and the table of results.

Groups of runs are the labels (the rows of the report), so a line is the mean over seeds and its
band their range.
"""

import os
import textwrap
from pathlib import Path
from typing import Any

from normexp.errors import UserError
from normexp.paths import OWN_RESULTS, RESULTS
from normexp.report.aggregate import rows_by_task
from normexp.report.csv_tables import RESULT_COLUMNS, result_lines
from normexp.report.paper import load_paper
from normexp.runs.evidence import is_evidence
from normexp.runs.records import load_records
from normexp.sites import SITES
from normexp.tracking.offline import check_connection
from normexp.tracking.tracker import STEP, Tracker
from normexp.training.diagnostics import SECOND_MOMENTS

NAME = "Norms compared"
TABLE = "results"
"""Id and name of the W&B run that holds the table of results, and the table's key in it."""
_SITES = tuple(dict.fromkeys(site for sites in SITES.values() for site in sites))
_RESULTS = {
    "test/bleu_tokenised": "BLEU, tokenised (test)",
    "test/sacrebleu": "sacreBLEU (test)",
    "test/perplexity_per_word": "Perplexity per word (test)",
    "test/perplexity_per_token": "Perplexity per token (test)",
}
_CURVES = {
    "valid/loss": "Validation loss, bits",
    "valid/ppl": "Validation perplexity",
    "valid/bleu": "Validation BLEU",
    "train_inner/loss": "Training loss, bits",
}
_STATISTICS = {
    **{f"{name}_distance": f"batch from running {name}, relative" for name in SECOND_MOMENTS},
    "mean_distance": "batch from running mean, in standard deviations",
    "nu_norm": "norm of nu",
    "grad_norm": "gradient norm",
}
_THROUGHPUT = {"train_inner/wps": "Target tokens per second", "train_inner/gnorm": "Gradient norm"}


def workspace(entity: str, project: str, task: str | None = None) -> Any:
    """Build the workspace without saving it; needs neither a key nor a network.

    entity: user or team at W&B. task: the only one to show (default: all). Raises UserError
    where the package wandb-workspaces is missing.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError:
        raise UserError(
            "the dashboard needs the package wandb-workspaces: pip install -e '.[dashboard]'"
        ) from None

    def lines(title: str, **what: Any) -> Any:
        return wr.LinePlot(
            title=title,
            x=STEP,
            groupby=wr.Config("label"),
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            max_runs_to_show=100,
            **what,
        )

    bars = [
        wr.BarPlot(
            title=title,
            metrics=[wr.SummaryMetric(metric)],
            orientation="v",
            groupby=wr.Config("label"),
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            max_runs_to_show=100,
        )
        for metric, title in _RESULTS.items()
    ]
    statistics = [
        lines(f"{site}: {title}", metric_regex=f"^diagnostics/norm/{site}(/[0-9]+)?/{statistic}$")
        for site in _SITES
        for statistic, title in _STATISTICS.items()
    ]
    runs = [ws.Config("task") == task] if task else []
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME if task is None else f"{NAME}: {task}",
        sections=[
            ws.Section(name="Results by norm, seeds as band", panels=bars, is_open=True),
            ws.Section(
                name="Curves",
                panels=[lines(title, y=[metric]) for metric, title in _CURVES.items()],
                is_open=True,
            ),
            ws.Section(
                name="Throughput",
                panels=[lines(title, y=[metric]) for metric, title in _THROUGHPUT.items()],
            ),
            ws.Section(name="Statistics of the norms by site", panels=statistics),
        ],
        settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=[ws.Metric("JobType") == "train", *runs],
            groupby=[ws.Config("task"), ws.Config("label")],
            pinned_columns=["summary:status", *(f"summary:{metric}" for metric in _RESULTS)],
        ),
    )


def save_workspace(entity: str | None, project: str, task: str | None = None) -> str:
    """Save the workspace at W&B, as a new one at each call, and return its address.

    entity: user or team (default: that of the API key). Raises UserError, within seconds, where
    there is no key, no network or W&B refuses.
    """
    import wandb

    check_connection()
    try:
        made = workspace(entity or wandb.Api().default_entity, project, task)
        made.save()
        return made.url
    except UserError:
        raise
    except Exception as error:
        cause = textwrap.shorten(str(error), 300) or type(error).__name__
        raise UserError(f"W&B did not save the workspace: {cause}") from None


def log_results(results: Path, project: str) -> int:
    """Log the records below `results` as a table, one row as in results/tables/*.csv.

    The W&B run is always the same, `results`, and shows the last table. Without a key or a network
    it is written below results/own/runs/dashboard for scripts/sync_wandb.py. Returns the number of
    rows. Raises UserError where there are no records or W&B fails.
    """
    records = load_records(results)
    if not records:
        raise UserError(f"no records below {results}/records; train something first")
    own_paper = results / "paper.yaml"
    paper = load_paper(own_paper if own_paper.is_file() else RESULTS / "paper.yaml")
    lines = [
        line
        for rows in rows_by_task(records).values()
        for line in result_lines(rows, paper, results)
    ]
    folder = (OWN_RESULTS if is_evidence(results) else results) / "runs" / "dashboard"
    # W&B keeps a table's content there until its upload; by default in the home folder.
    os.environ["WANDB_DATA_DIR"] = str((folder / "wandb" / "data").absolute())
    about = {"run_id": TABLE, "name": TABLE, "group": "report", "job_type": "report"}
    with Tracker.start(
        "online", project, folder, tags=[], config={"num_records": len(records)}, **about
    ) as tracker:
        tracker.table(
            TABLE,
            RESULT_COLUMNS,
            [[line.get(column) for column in RESULT_COLUMNS] for line in lines],
        )
        tracker.summarize({"status": "complete"})
        if not tracker.is_on:
            raise UserError("the table is not logged; the warning above says why")
    return len(lines)
