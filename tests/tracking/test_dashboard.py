"""The dashboard as code: what the workspace shows, and the table of results."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.wandb_server import KEY

from normexp.errors import UserError
from normexp.tracking import dashboard
from normexp.tracking.dashboard import log_results, save_workspace, workspace
from normexp.tracking.offline import find_offline_runs, upload

pytestmark = pytest.mark.usefixtures("isolated_wandb")
REPOSITORY = Path(__file__).resolve().parents[2]


def spec(made) -> dict:
    """What W&B would be sent."""
    return json.loads(made._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))


def panels(made) -> dict[str, list[dict]]:
    sections = spec(made)["section"]["panelBankConfig"]["sections"]
    return {x["name"]: [panel["config"] for panel in x["panels"]] for x in sections if x["panels"]}


def test_panels_compare_the_norms_with_their_seeds_as_band():
    shown = panels(workspace("somebody", "normexp"))
    results, curves, throughput, statistics = shown.values()
    assert [panel["metrics"] for panel in results][:1] == [["summary_metrics.test/bleu_tokenised"]]
    plotted = {metric for panel in [*curves, *throughput] for metric in panel["metrics"]}
    assert {"valid/loss", "valid/bleu", "train_inner/loss", "train_inner/wps"} <= plotted
    for panel in [*results, *curves, *throughput, *statistics]:
        assert panel["groupBy"] == "label.value"
        assert (panel["groupAgg"], panel["groupArea"]) == ("mean", "minmax")
    assert all(panel["xAxis"] == "num_updates" for panel in [*curves, *throughput, *statistics])


def test_statistics_of_every_site_are_found_by_their_names():
    patterns = [panel["metricRegex"] for panel in list(panels(workspace("a", "b")).values())[-1]]
    for name, number in (
        ("diagnostics/norm/encoder_attention/0/psi2_distance", 1),
        ("diagnostics/norm/decoder_ffn/15/grad_norm", 1),
        ("diagnostics/norm/encoder_final/nu_norm", 1),
        ("diagnostics/norm/encoder_final/psi2_mean", 0),
        ("valid/loss", 0),
    ):
        assert sum(bool(re.search(pattern, name)) for pattern in patterns) == number, name


def test_runs_are_grouped_by_task_and_label_and_may_be_chosen():
    [runs] = spec(workspace("a", "b", task="iwslt14"))["section"]["runSets"]
    assert [key["name"] for key in runs["grouping"]] == ["task.value", "label.value"]
    chosen = {(f["key"]["name"], f["value"]) for f in runs["filters"]["filters"]}
    assert chosen == {("jobType", "train"), ("task", "iwslt14")}
    [runs] = spec(workspace("a", "b"))["section"]["runSets"]
    assert [f["value"] for f in runs["filters"]["filters"]] == ["train"]


def test_the_workspace_is_saved_where_there_is_an_account(wandb_server):
    address = save_workspace("somebody", "normexp", "ptb")
    [sent] = [x["variables"] for _, x in wandb_server.posts if x and "UpsertView2" in str(x)]
    assert (sent["entityName"], sent["projectName"]) == ("somebody", "normexp")
    assert sent["displayName"] == "Norms compared: ptb"
    assert "somebody/normexp" in address


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "no API key"),
        ({"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}, "does not answer"),
    ],
)
def test_saving_without_an_account_or_a_network_says_so(environment, message, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        save_workspace(None, "normexp")


def test_the_table_has_the_rows_of_the_report(tmp_path, wandb_server):
    """Logged offline behind an earlier one, uploaded later: the last one counts."""
    results = tmp_path / "results"
    shutil.copytree(REPOSITORY / "results/records/ptb", results / "records/ptb")
    shutil.copy(REPOSITORY / "results/paper.yaml", results)
    with open(REPOSITORY / "results/tables/ptb.csv", encoding="utf-8", newline="") as file:
        expected = list(csv.DictReader(file))
    wandb_server.refuse = lambda path, body: 503
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("normexp.tracking.tracker.INIT_TIMEOUT_SECONDS", 1.0)
        assert log_results(results, "normexp") == len(expected)
    wandb_server.refuse = lambda path, body: None
    [run] = find_offline_runs([results / "runs"])
    [log] = run.logs
    [file] = log.parent.glob("files/media/table/*.json")
    table = json.loads(file.read_text(encoding="utf-8"))
    assert len(table["data"]) == len(expected)
    for row, line in zip(table["data"], expected, strict=True):
        shown = dict(zip(table["columns"], row, strict=True))
        for name, text in line.items():
            if name != "records":  # relative to another folder
                assert str("" if shown[name] is None else shown[name]) == text, name
    upload(log)
    assert wandb_server.runs["results"].summary["results"]["nrows"] == len(expected)
    assert wandb_server.runs["results"].about["jobType"] == "report"


def test_no_records_are_an_error(tmp_path):
    with pytest.raises(UserError, match="no records below"):
        log_results(tmp_path, "normexp")


def test_the_script_reports_errors_in_one_line():
    script = [sys.executable, str(REPOSITORY / "scripts/dashboard.py")]
    shown = subprocess.run([*script, "workspace"], capture_output=True, text=True, timeout=120)
    assert shown.returncode == 1 and "error: no API key" in shown.stderr
    assert shown.stderr.count("\n") == 1
    shown = subprocess.run([*script, "workspace", "task=ptb"], capture_output=True, text=True)
    assert shown.returncode == 2 and "write --task ptb" in shown.stderr


def test_the_package_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[dashboard\]'"):
        dashboard.workspace("a", "b")
