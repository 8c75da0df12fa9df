"""Scores against stock fairseq's tools, and against brute force."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.small_runs import REPOSITORY, composed

from normexp import pipeline
from normexp.checkpoints import store
from normexp.corpora import prepare
from normexp.corpora.tokenization import tokenize_aggressive
from normexp.errors import UserError
from normexp.evaluation import bleu, reevaluation, scores


def fairseq(tool: str, *arguments: str) -> str:
    shown = subprocess.run(
        [
            Path(sys.executable).parent / tool,
            *arguments,
            "--cpu",
            "--user-dir",
            REPOSITORY / "normexp/fairseq_plugin",
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert shown.returncode == 0, shown.stderr
    return shown.stdout + shown.stderr


@pytest.fixture
def trained(overrides, tmp_path, data_dir):
    """A short run of a task: its record, the evaluated checkpoint and the corpus."""

    def build(task: str, *more: str):
        record = pipeline.run(composed(*overrides(task, *more)))
        folder = next((tmp_path / "results/runs" / task).iterdir()) / "checkpoints"
        return record, folder, prepare(task, data_dir)

    return build


def test_bleu_is_stock_fairseqs(trained) -> None:
    """Learned enough to score; odd number of sentences per batch; every sentence counted."""
    record, folder, corpus = trained(
        "toy_translation",
        "norm=power",
        "evaluation.beam=3",
        "evaluation.average_last=1",
        "fairseq.model.encoder.embed_dim=64",
        "fairseq.model.decoder.embed_dim=64",
        "fairseq.dataset.max_tokens=2400",
        "evaluation.splits=[test]",
        "fairseq.optimization.lr=[0.01]",
        "task.norm_warmup_steps=50",
        "evaluation.length_penalty=0.6",
    )
    shown = fairseq(
        "fairseq-generate",
        str(corpus.data_bin),
        "--path",
        str(folder / "checkpoint2.pt"),
        "--beam",
        "3",
        "--lenpen",
        "0.6",
        "--remove-bpe",
        "--max-tokens",
        "3000",
        "--required-batch-size-multiple",
        "1",
    )
    assert len(re.findall(r"^H-", shown, re.MULTILINE)) == 500
    stock = float(re.search(r"BLEU4 = ([\d.]+)", shown)[1])
    assert stock > 1
    assert round(record.metrics["test"]["bleu_tokenised"], 2) == stock


ADAPTIVE = [
    "model=tensorized_wikitext103",
    "fairseq.criterion._name=normexp_adaptive_loss",
    "+fairseq.distributed_training.ddp_backend=legacy_ddp",
    "fairseq.model.adaptive_softmax_cutoff='8,60'",
    "fairseq.model.adaptive_softmax_factor=2",
]


@pytest.mark.parametrize("model", [[], ADAPTIVE], ids=["transformer", "tensorized, adaptive"])
def test_perplexity_is_stock_fairseqs(model: list[str], trained) -> None:
    record, folder, corpus = trained("toy_language_model", "norm=power", *model)
    assert record.sees_future_tokens is False
    shown = fairseq(
        "fairseq-eval-lm",
        str(corpus.data_bin),
        "--path",
        str(folder / "checkpoint_best.pt"),
        "--tokens-per-sample",
        "64",
        "--batch-size",
        "7",
        "--gen-subset",
        "test",
    )
    tokens = int(re.search(r"Evaluated ([\d,]+) tokens", shown)[1].replace(",", ""))
    assert tokens == corpus.tokens("test")
    stock = float(re.search(r"Perplexity: ([\d.]+)", shown)[1])
    found = record.metrics["test"]
    assert found["perplexity_per_token"] == pytest.approx(stock, abs=0.006)
    words = corpus.words("test") + corpus.sentences("test")
    assert found["perplexity_per_word"] == pytest.approx(
        math.exp(found["loss_per_token_nats"] * tokens / words)
    )
    assert words < tokens


@pytest.mark.parametrize("task", ["toy_translation", "toy_language_model"])
def test_evaluation_refuses_to_leave_anything_out(task, trained, monkeypatch) -> None:
    """One batch lost on the way is an error, not a score."""
    _, folder, corpus = trained(task, "evaluation.splits=[valid]")
    loaded = scores.load_model(folder / store.LAST, corpus.data_bin)
    whole = scores._batches
    monkeypatch.setattr(scores, "_batches", lambda *arguments: list(whole(*arguments))[:-1])
    with pytest.raises(UserError, match=r"scored \d+ tokens of test, which has \d+"):
        scores.score(loaded, "test", 1000, progress=False)
    if task == "toy_translation":
        with pytest.raises(UserError, match=r"translated \d+ sentences of test, which has 500"):
            scores.translate(loaded, "test", 1, 1.0, 1000, progress=False)


@pytest.mark.parametrize("max_tokens", [300, 4000])
def test_score_does_not_depend_on_the_batches(max_tokens, trained) -> None:
    _, folder, corpus = trained("toy_translation", "norm=batch", "evaluation.splits=[valid]")
    loaded = scores.load_model(folder / store.LAST, corpus.data_bin)
    nll, tokens = scores.score(loaded, "test", max_tokens, progress=False)
    # by hand: one sentence at a time, without padding
    dataset, total = loaded.task.dataset("test"), 0.0
    with torch.inference_mode():
        for i in range(len(dataset)):
            sample = dataset.collater([dataset[i]])
            logits, _ = loaded.model(**sample["net_input"])
            picked = logits.log_softmax(-1).gather(-1, sample["target"].unsqueeze(-1))
            total -= float(picked.sum())
    assert tokens == corpus.tokens("test")
    assert nll == pytest.approx(total, rel=1e-5)


def test_bleu_rules() -> None:
    """multi-bleu's score, except that an empty hypothesis counts as one word."""
    from sacrebleu.metrics import BLEU

    references = ["the cat sat on the mat .", "a man is here today now", "he left the house early"]
    hypotheses = ["the cat sat on a mat .", "a man is here now today", "he left the house early"]
    plain = BLEU(tokenize="none", smooth_method="none", force=True)
    expected = plain.corpus_score(hypotheses, [references]).score
    assert bleu.tokenised_bleu(hypotheses, references) == pytest.approx(expected, rel=1e-5)

    hypotheses[2] = ""
    # by the formula: lengths 7 + 6 + 1 against 7 + 6 + 5
    one_word = plain.corpus_score([*hypotheses[:2], "<empty>"], [references])
    with_empty = bleu.tokenised_bleu(hypotheses, references)
    assert one_word.sys_len == 14
    assert with_empty == pytest.approx(one_word.score, rel=1e-5)
    assert with_empty != pytest.approx(plain.corpus_score(hypotheses, [references]).score)


def test_sacrebleu_is_of_detokenised_text() -> None:
    tokenised = "it &apos;s a well @-@ known man , isn &apos;t it ?"
    (text,) = bleu.detokenise([tokenised], "en")
    assert text == "it's a well-known man, isn't it?"
    value, signature = bleu.sacre_bleu([text], ["It's a well-known man, isn't it?"], True)
    assert value == pytest.approx(100.0)
    assert "case:lc" in signature and "tok:13a" in signature


@pytest.mark.parametrize(
    ("line", "split"),
    [
        ("Ost-West", "Ost ##AT##-##AT## West"),
        ("ein - Strich", "ein - Strich"),
        ("-vorn und hinten-", "-vorn und hinten-"),
        # neighbours are consumed, as in the published scripts
        ("a-b-c", "a ##AT##-##AT## b-c"),
        ("x--y", "x ##AT##-##AT## -y"),
        ("1-2-3-4", "1 ##AT##-##AT## 2-3 ##AT##-##AT## 4"),
    ],
)
def test_compounds_are_split_as_the_published_scripts_do(line: str, split: str) -> None:
    assert bleu.split_compounds(line) == split


def test_compound_split_bleu_takes_text_without_marks_of_hyphens() -> None:
    """The score of text tokenised without -a; the marks of -a would change every count."""
    references = ["Der Ost-West-Konflikt war lange gut bekannt.", "Das ist ein Test-Satz, oder?"]
    hypotheses = ["Der Ost-West-Konflikt ist lange gut bekannt.", "Das ist ein Testsatz, oder?"]
    by_hand = [
        [
            f"Der Ost ##AT##-##AT## West-Konflikt {verb} lange gut bekannt .",
            f"Das ist ein {noun} , oder ?",
        ]
        for verb, noun in (("ist", "Testsatz"), ("war", "Test ##AT##-##AT## Satz"))
    ]
    # "Ost-West-Konflikt": the hyphens are not neighbours, so both are split
    by_hand = [
        [line.replace("West-K", "West ##AT##-##AT## K") for line in text] for text in by_hand
    ]
    assert bleu.compound_split_bleu(hypotheses, references, "de") == pytest.approx(
        bleu.tokenised_bleu(*by_hand)
    )
    tokenised = [tokenize_aggressive(line, "de") for line in hypotheses]
    assert bleu.detokenise(tokenised, "de") == hypotheses
    trapped = bleu.tokenised_bleu(
        [bleu.split_compounds(line) for line in tokenised],
        [bleu.split_compounds(tokenize_aggressive(line, "de")) for line in references],
    )
    assert trapped != pytest.approx(bleu.tokenised_bleu(*by_hand), abs=0.1)


def test_compound_split_bleu_is_recorded_where_asked_for(trained) -> None:
    more = ("norm=layer", "evaluation.compound_split=true", "evaluation.splits=[test]")
    record, folder, corpus = trained("toy_translation", *more)
    hypotheses = (folder.parent / "hypotheses/test.txt").read_text().split("\n")[:-1]
    references = corpus.raw_reference("test").read_text().split("\n")[:-1]
    assert record.metrics["test"]["bleu_compound_split"] == pytest.approx(
        bleu.compound_split_bleu(hypotheses, references, "en")
    )


def test_a_folded_model_scores_the_same(trained, capsys) -> None:
    """`evaluate.py RUN --fold`, whose table sets now beside the record; refused for LN."""
    record, folder, _ = trained("toy_language_model", "norm=power", "evaluation.splits=[valid]")
    capsys.readouterr()
    reevaluation.main(folder.parent, [], fold=True)
    shown = capsys.readouterr().out
    assert "norms folded" in shown
    perplexity = record.metrics["valid"]["perplexity_per_word"]
    now, recorded = re.search(r"perplexity_per_word\s+│\s+([\d.]+)\s+│\s+([\d.]+)", shown).groups()
    assert float(recorded) == pytest.approx(perplexity, abs=1e-3)
    assert float(now) == pytest.approx(perplexity, rel=1e-4)
    with pytest.raises(UserError, match=r"'seed=2': only evaluation.<key>"):
        reevaluation.main(folder.parent, ["seed=2"], fold=True)


def test_folding_of_layer_norms_is_refused(trained) -> None:
    _, folder, _ = trained("toy_language_model", "norm=layer", "evaluation.splits=[valid]")
    with pytest.raises(UserError, match=r"no norm of this model can be folded.*LayerNorm"):
        reevaluation.main(folder.parent, [], fold=True)
