"""The worked example of docs/own_corpus.md, command by command, as the page has it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sacrebleu

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "own_corpus.md").read_text("utf-8")


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder like the repository's root where the commands ran, and what each block printed."""
    root = tmp_path_factory.mktemp("root")
    for folder in ("scripts", "configs"):
        (root / folder).symlink_to(REPOSITORY / folder)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "NORMEXP_OWN_CORPORA": str(root / "own"),
        "OMP_NUM_THREADS": "1",
    }
    printed = []
    for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        done = subprocess.run(
            ["bash", "-e", "-c", block], cwd=root, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        printed.append(done.stdout + done.stderr)
    return root, printed


def test_the_page_shows_what_is_printed(example: tuple[Path, list[str]]) -> None:
    (shown,) = re.findall(r"^```text\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert example[1][0].startswith(shown)
    assert "python scripts/train.py task=trees norm=power" in example[1][0]


def test_the_run_is_recorded_and_its_bleu_is_of_the_users_text(
    example: tuple[Path, list[str]],
) -> None:
    root, printed = example
    assert re.search(r"trees +PN.* 1 +done", printed[1])
    (path,) = root.glob("results/**/records/trees/*.json")
    record = json.loads(path.read_text("utf-8"))
    assert record["status"] == "complete" and record["corpus"]["name"] == "trees"
    (written,) = root.glob("results/**/runs/trees/*/hypotheses/test.txt")
    hypotheses = written.read_text("utf-8").splitlines()
    # The corpus was replaced meanwhile; the data of the run are still there.
    data = root / "data" / record["config"]["task"]["corpus"]
    references = (data / "text/reference/test.fr").read_text("utf-8").splitlines()
    assert len(hypotheses) == len(references) == 7
    assert set(references) < set((root / "trees.fr").read_text("utf-8").splitlines())
    expected = sacrebleu.corpus_bleu(hypotheses, [references]).score
    assert record["metrics"]["test"]["sacrebleu"] == pytest.approx(expected)


def test_the_changed_text_stops_and_is_replaced(example: tuple[Path, list[str]]) -> None:
    root, printed = example
    assert "trees.cs has changed since the corpus trees was made of it" in printed[2]
    assert "stopped\ntrees: cs to fr" in printed[2]
    assert "domky" in (root / "own/corpora/trees/train.cs").read_text("utf-8")
