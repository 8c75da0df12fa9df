"""Multi30k and Penn Treebank from their real files, and the command line."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from stand_ins import text_lines

from normexp.corpora import prepare

REPOSITORY = Path(__file__).parents[2]


def download(*arguments: str) -> subprocess.CompletedProcess:
    """Runs scripts/download.py."""
    command = [sys.executable, str(REPOSITORY / "scripts" / "download.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_penn_treebank(local_data, tmp_path) -> None:
    """The published counts, and the dictionary of fairseq-preprocess."""
    corpus = prepare("ptb", tmp_path, local_data, progress=False)
    counts = [
        (corpus.sentences(split), corpus.words(split), corpus.tokens(split))
        for split in ("train", "valid", "test")
    ]
    assert counts == [(42_068, 887_521, 929_589), (3_370, 70_390, 73_760), (3_761, 78_669, 82_430)]
    dictionary = (corpus.data_bin / "dict.txt").read_bytes()
    assert hashlib.sha256(dictionary).hexdigest() == (
        "137e2bee0251292e1a1916315119474a0214cd0d996e0e866516f704aa289bbd"
    )

    shown = download("task=ptb", f"data.dir={tmp_path}")
    assert shown.returncode == 0, shown.stderr
    row = next(line for line in shown.stdout.splitlines() if "train.tokens.en" in line)
    assert row.count("929,589") == 2 and "ok" in row
    assert "differs" not in shown.stdout


def test_multi30k(local_data, tmp_path) -> None:
    corpus = prepare("multi30k", tmp_path, local_data, progress=False)
    assert [corpus.sentences(split) for split in ("train", "valid", "test")] == [
        29_000,
        1_014,
        1_000,
    ]
    # The README of the corpus, but for the last dot of 12 German lines (see test_tokenization).
    assert corpus.words("train", "en") == 377_534
    assert corpus.words("train", "de") == 360_706 + 12
    assert (corpus.words("valid", "de"), corpus.words("valid", "en")) == (12_828, 13_308)
    assert (corpus.words("test", "de"), corpus.words("test", "en")) == (12_103 + 1, 12_968)
    assert text_lines(corpus.raw_reference("test"))[0] == (
        "A man in an orange hat starring at something."
    )
    assert corpus.lowercase
    assert corpus.manifest["dictionary_types"]["de"] == corpus.manifest["dictionary_types"]["en"]


def test_help_says_how_to_use_it() -> None:
    shown = download("--help")
    assert shown.returncode == 0
    for text in ("task=multi30k", "data.local", "wmt14_fairseq", "toy_translation"):
        assert text in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task=wmt99"], "wmt99"),
        (["task=ptb", "data.dirr=x"], "data.dirr"),
        (["task=ptb", "data.local=/no/where"], "data.local=/no/where is not a folder"),
    ],
)
def test_errors_are_one_line(tmp_path, arguments: list[str], message: str) -> None:
    shown = download(*arguments, *([] if "99" in arguments[0] else [f"data.dir={tmp_path}"]))
    assert shown.returncode == 1
    assert shown.stderr.startswith("error: ") and shown.stderr.count("\n") == 1
    assert message in shown.stderr
