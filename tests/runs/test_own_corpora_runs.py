"""Whole runs on own corpora whose models differ from those of the project's tasks."""

import json
import math
from pathlib import Path

import pytest
import sacrebleu
import torch
from fairseq_cli import preprocess
from support.own_text import PAIRS, parallel, write
from support.small_runs import SMALL, composed

from normexp import pipeline
from normexp.checkpoints import store
from normexp.config import own_tasks
from normexp.corpora import prepare
from normexp.corpora.adding import add_corpus
from normexp.corpora.own_request import Request
from normexp.errors import UserError
from normexp.evaluation.scores import load_model


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMEXP_OWN_CORPORA", str(tmp_path / "own"))


def settings(tmp_path: Path, small: str, *more: str):
    return composed(
        "task=mine", "norm=power", f"data.dir={tmp_path / 'data'}",
        f"results_dir={tmp_path / 'results'}", "tracking=disabled",
        "fairseq.optimization.max_epoch=2", *SMALL[small], *more,
    )  # fmt: skip


def test_binarized_data_with_two_dictionaries(tmp_path: Path) -> None:
    """Two dictionaries: the encoder and the decoder cannot share their embeddings."""
    prefixes = []
    for split, part in (("train", PAIRS[:280]), ("valid", PAIRS[280:300]), ("test", PAIRS[300:])):
        (tmp_path / split).mkdir()
        prefixes.append(f"--{split}pref={parallel(tmp_path / split, part)[0].with_suffix('')}")
    arguments = [*prefixes, f"--destdir={tmp_path / 'b'}", "--source-lang=cs", "--target-lang=fr"]
    preprocess.main(preprocess.options.get_preprocessing_parser().parse_args(arguments))
    add_corpus(Request("mine", [tmp_path / "b"], data_dir=tmp_path / "data"))
    record = pipeline.run(settings(tmp_path, "toy_translation"))
    assert record.status == "complete" and record.corpus["name"] == "mine"
    (folder,) = (tmp_path / "results" / "runs" / "mine").iterdir()
    hypotheses = (folder / "hypotheses" / "test.txt").read_text("utf-8").splitlines()
    references = [french for _, french in PAIRS[300:]]
    expected = sacrebleu.corpus_bleu(hypotheses, [references], tokenize="none", force=True).score
    assert record.metrics["test"]["sacrebleu"] == pytest.approx(expected)
    weights = store.load(next((folder / "checkpoints").glob("*last*.pt")))["model"]
    sizes = [len(weights[f"{part}.embed_tokens.weight"]) for part in ("encoder", "decoder")]
    counted = [len((tmp_path / "b" / f"dict.{code}.txt").read_text().splitlines()) + 4
               for code in ("cs", "fr")]  # fmt: skip
    assert sizes == counted and sizes[0] != sizes[1]


def test_perplexity_of_a_language_models_pieces(tmp_path: Path) -> None:
    """The likelihood of every token, computed once more from the model's outputs."""
    text = [" ".join(p for word in a.split() for p in (f"\u2581{word[:2]}", word[2:]) if p)
            for a, _ in PAIRS]  # fmt: skip
    path = write(tmp_path / "text.cs", text)
    add_corpus(Request("mine", [path], segmented="sentencepiece", data_dir=tmp_path / "data"))
    record = pipeline.run(settings(tmp_path, "toy_language_model"))
    (folder,) = (tmp_path / "results" / "runs" / "mine").iterdir()
    corpus = prepare("mine", tmp_path / "data")
    loaded = load_model(folder / "checkpoints" / "checkpoint_best.pt", corpus.data_bin, cpu=True)
    loaded.task.load_dataset("test")
    nats, tokens = 0.0, 0
    blocks = loaded.task.dataset("test")
    for block in (blocks[i] for i in range(len(blocks))):
        with torch.no_grad():
            logits, _ = loaded.model(block["source"][None].long())
        probabilities = torch.log_softmax(logits[0].double(), dim=-1)
        target = block["target"].long()
        nats -= float(probabilities[torch.arange(len(target)), target].sum())
        tokens += len(target)
    held = text[-16:]  # the last ones, as the page says
    assert tokens == sum(len(line.split()) + 1 for line in held)
    words = sum(len(line.replace(" ", "").split("\u2581")[1:]) + 1 for line in held)
    assert record.metrics["test"]["perplexity_per_word"] == pytest.approx(
        math.exp(nats / words), rel=1e-4
    )


def test_a_changed_text_is_noticed_although_the_run_is_complete(tmp_path: Path) -> None:
    path = write(tmp_path / "text.cs", [a for a, _ in PAIRS])
    add_corpus(Request("mine", [path], data_dir=tmp_path / "data"))
    before = settings(tmp_path, "toy_language_model")
    own_tasks.require_current_corpus(before)
    path.write_bytes(path.read_bytes() + b"konec .\n")
    with pytest.raises(UserError, match=r"text\.cs has changed"):
        own_tasks.require_current_corpus(before)
    add_corpus(Request("mine", [path], data_dir=tmp_path / "data", replace=True))
    after = settings(tmp_path, "toy_language_model")
    own_tasks.require_current_corpus(after)
    assert json.dumps(after.experiment()) != json.dumps(before.experiment())


def test_runs_on_two_versions_of_a_text_stand_beside_each_other(tmp_path: Path) -> None:
    path = write(tmp_path / "text.cs", [a for a, _ in PAIRS])
    for more in (b"", b"konec .\n"):
        path.write_bytes(path.read_bytes() + more)
        add_corpus(Request("mine", [path], data_dir=tmp_path / "data", replace=bool(more)))
        chosen = [one for one in SMALL["toy_language_model"] if not one.startswith("label=")]
        command = ["task=mine", "norm=power", "fairseq.optimization.max_update=1", *chosen]
        places = [f"data.dir={tmp_path / 'data'}", f"results_dir={tmp_path / 'results'}"]
        run = composed(*command, *places, "tracking=disabled")
        digest = run.task.corpus.partition("@")[2]
        assert run.label.startswith(f"PN+corpus={digest[:8]}+")
        assert pipeline.run(run).status == "complete"
    assert len([*(tmp_path / "results/records/mine").iterdir()]) == 2
