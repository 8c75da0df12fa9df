"""W&B without the developer's account: no key, no network, no home folder."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.wandb_server import KEY, Server, running_server


@pytest.fixture
def isolated_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import wandb

    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    for name in ("CONFIG", "CACHE", "DATA", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(home))
    for name in ("API_KEY", "IDENTITY_TOKEN_FILE", "MODE", "RUN_GROUP", "TAGS", "NAME", "RUN_ID"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    wandb.teardown()  # the settings of an earlier test would outlive its environment
    yield
    wandb.teardown()


@pytest.fixture
def wandb_server(isolated_wandb, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server for W&B's client on this machine, and a key for it."""
    import wandb

    with running_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield server
        wandb.teardown()


@pytest.fixture
def inspect():
    """Read a W&B log back with W&B's own tool: its records by type, and its summary."""

    def read(log: Path) -> tuple[dict[str, list[dict]], dict]:
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json"]
        lines = subprocess.check_output([*command, str(log)], text=True).split("\n")
        records: dict[str, list[dict]] = {}
        for line in filter(None, lines):
            record = json.loads(line)
            records.setdefault(record["type"], []).append(record[record["type"]])
        summary = json.loads(subprocess.check_output([*command, "--summary", str(log)], text=True))
        return records, summary

    return read
