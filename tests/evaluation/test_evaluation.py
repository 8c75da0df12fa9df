"""Scores against stock fairseq's tools, and against brute force."""

import math
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from fairseq.data import Dictionary
from support.small_runs import REPOSITORY, SMALL, composed

from normexp import pipeline
from normexp.checkpoints import store
from normexp.corpora import PreparedCorpus, prepare
from normexp.corpora.catalogue import CATALOGUE
from normexp.corpora.tokenization import tokenize_aggressive
from normexp.errors import UserError
from normexp.evaluation import beam_search, bleu, reevaluation, scores, translations
from normexp.runs.records import Record


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


@dataclass(frozen=True)
class Trained:
    """A short run: its record, the folder with its checkpoints, and the corpus."""

    record: Record
    folder: Path
    corpus: PreparedCorpus


def train(overrides: list[str], results: Path, data_dir: Path) -> Trained:
    cfg = composed(*overrides, f"data.dir={data_dir}", f"results_dir={results}")
    record = pipeline.run(cfg)
    folder = next((results / "runs" / record.task).iterdir()) / "checkpoints"
    return Trained(record, folder, prepare(record.task, data_dir))


@pytest.fixture
def trained(overrides, tmp_path, data_dir, monkeypatch) -> Callable[..., Trained]:
    """A short run of a task on the whole corpus, also after a test on little text."""
    *others, _ = prepare.__defaults__
    monkeypatch.setattr(prepare, "__defaults__", (*others, CATALOGUE))

    def build(task: str, *more: str) -> Trained:
        return train([*overrides(task), *more], tmp_path / "results", data_dir)

    return build


@pytest.fixture(scope="module")
def on_little_text(tmp_path_factory, little_text) -> Callable[[str, str], Trained]:
    """on_little_text(task, norm): such a run, made once for all tests; they leave it as it is."""

    @cache
    def build(task: str, norm: str) -> Trained:
        settings = [
            *(f"task={task}", f"norm={norm}", *SMALL[task], "tracking=disabled"),
            *("fairseq.optimization.max_epoch=2", "fairseq.dataset.max_tokens=1000"),
        ]
        if task == "toy_translation":
            settings.append("evaluation.compound_split=true")
        return train(settings, tmp_path_factory.mktemp(norm), little_text)

    return build


def test_bleu_is_stock_fairseqs(trained) -> None:
    """Learned enough to score; odd number of sentences per batch; every sentence counted."""
    run = trained(
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
        str(run.corpus.data_bin),
        "--path",
        str(run.folder / "checkpoint2.pt"),
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
    assert round(run.record.metrics["test"]["bleu_tokenised"], 2) == stock


ADAPTIVE = [
    "model=tensorized_wikitext103",
    "fairseq.criterion._name=normexp_adaptive_loss",
    "+fairseq.distributed_training.ddp_backend=legacy_ddp",
    "fairseq.model.adaptive_softmax_cutoff='8,60'",
    "fairseq.model.adaptive_softmax_factor=2",
]


@pytest.mark.parametrize("model", [[], ADAPTIVE], ids=["transformer", "tensorized, adaptive"])
def test_perplexity_is_stock_fairseqs(
    model: list[str], on_little_text, overrides, tmp_path, little_text
) -> None:
    if model:
        settings = overrides("toy_language_model", "norm=power", *model)
        run = train(settings, tmp_path / "results", little_text)
    else:
        run = on_little_text("toy_language_model", "power")
    record, folder, corpus = run.record, run.folder, run.corpus
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
def test_evaluation_refuses_to_leave_anything_out(task, on_little_text, monkeypatch) -> None:
    """One batch lost on the way is an error, not a score."""
    run = on_little_text(task, "batch" if task == "toy_translation" else "power")
    loaded = scores.load_model(run.folder / store.LAST, run.corpus.data_bin)
    whole = scores._batches
    monkeypatch.setattr(scores, "_batches", lambda *arguments: list(whole(*arguments))[:-1])
    with pytest.raises(UserError, match=r"scored [1-9]\d* tokens of test, which has \d+"):
        scores.score(loaded, "test", 100, progress=False)
    if task == "toy_translation":
        with pytest.raises(UserError, match=r"translated [1-9]\d* sentences of test, which has 12"):
            scores.translate(loaded, "test", 1, 1.0, 100, progress=False)


def test_translations_do_not_depend_on_the_search(on_little_text, monkeypatch, caplog) -> None:
    """Side by side in two threads, in one, or by fairseq, which the log says once."""
    run = on_little_text("toy_translation", "batch")
    loaded = scores.load_model(run.folder / store.LAST, run.corpus.data_bin)
    monkeypatch.setattr(beam_search, "_SENTENCES_AT_ONCE", 3)
    searching, search = [], beam_search.BeamSearch.__call__

    def spied(*arguments):
        searching.append(threading.get_ident())
        return search(*arguments)

    monkeypatch.setattr(beam_search.BeamSearch, "__call__", spied)

    def translated(num_threads: int) -> list[list[int]]:
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        try:
            found = scores.translate(loaded, "test", 4, 0.8, 4000, progress=False)
        finally:
            torch.set_num_threads(before)
        return [one.tolist() for one in found]

    alone = translated(1)
    assert searching == 4 * [threading.get_ident()]
    searching.clear()
    assert translated(2) == alone
    assert len(searching) == 4 and threading.get_ident() not in searching
    searching.clear()
    monkeypatch.setattr(beam_search, "why_not", lambda *_: "a reason of this test")
    assert translated(1) == alone == translated(1)
    assert searching == []
    assert caplog.text.count("a reason of this test") == 1


@pytest.mark.parametrize("max_tokens", [100, 4000])
def test_score_does_not_depend_on_the_batches(max_tokens, on_little_text) -> None:
    run = on_little_text("toy_translation", "batch")
    loaded = scores.load_model(run.folder / store.LAST, run.corpus.data_bin)
    nll, tokens = scores.score(loaded, "test", max_tokens, progress=False)
    # by hand: one sentence at a time, without padding
    dataset, total = loaded.task.dataset("test"), 0.0
    with torch.inference_mode():
        for i in range(len(dataset)):
            sample = dataset.collater([dataset[i]])
            logits, _ = loaded.model(**sample["net_input"])
            picked = logits.log_softmax(-1).gather(-1, sample["target"].unsqueeze(-1))
            total -= float(picked.sum())
    assert tokens == run.corpus.tokens("test")
    assert nll == pytest.approx(total, rel=1e-5)


def test_an_unknown_word_of_the_reference_matches_nothing() -> None:
    """Else a model would score by translating into unknown words."""
    dictionary = Dictionary()
    known = [dictionary.add_symbol(word) for word in ["a", "b", "c", "d", "e"]]

    def score(tokens: list[int]) -> float:
        ids = torch.tensor([*tokens, dictionary.eos()])
        texts = [translations.to_text(dictionary, ids, None, reference=r) for r in (False, True)]
        return bleu.tokenised_bleu(*([text] for text in texts))

    assert score(known) == pytest.approx(100)
    assert score([*known, dictionary.unk()]) < 90


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


PUBLISHED = [  # a line, and the words that the published scripts score
    ("Er sagte: „Ja“, und ging.", "Er sagte : &quot; Ja &quot; , und ging ."),
    ("”So” sei‘s, ’nein’…", "&quot; So &quot; sei ‘ s , &apos; nein &apos; ..."),
    ("Äpfel, Birnen usw.", "Äpfel , Birnen usw."),  # the last dot stays
    ("Am 20.", "Am 20."),
    ("Das war alles.", "Das war alles ."),
    ("Der Ost-West-Konflikt – z.B.", "Der Ost ##AT##-##AT## West ##AT##-##AT## Konflikt – z.B."),
    ("„a-b-c“", "&quot; a ##AT##-##AT## b-c &quot;"),
    ("5 ％（netto）", "5 % ( netto )"),
]


def bleu_by_counting(hypotheses: list[str], references: list[str]) -> float:
    """multi-bleu.perl's score of tokenised text, from its definition."""
    logs = 0.0
    lengths = [len(" ".join(text).split()) for text in (hypotheses, references)]
    for n in range(1, 5):
        matches = total = 0
        for pair in zip(hypotheses, references, strict=True):
            words = [line.split() for line in pair]
            ours, theirs = (Counter(zip(*(w[i:] for i in range(n)), strict=False)) for w in words)
            matches, total = matches + (ours & theirs).total(), total + ours.total()
        logs += math.log(matches / total) / 4
    return 100 * math.exp(logs + min(0, 1 - lengths[1] / lengths[0]))


def test_published_compound_split_bleu_follows_every_rule() -> None:
    """Recomputed from words written down by hand; one rule less gives another score."""
    references = [line for line, _ in PUBLISHED]
    # A model trained on normalised text: no typographic quotes, some words lost, a line empty.
    hypotheses = [line.translate(str.maketrans("„“”", '"""')) for line in references]
    hypotheses[4] = ""
    hypotheses[2] = "Äpfel, Birnen und Pflaumen usw."
    words = [words for _, words in PUBLISHED]
    of_hypotheses = [*words[:2], "Äpfel , Birnen und Pflaumen usw.", words[3], "", *words[5:]]
    expected = bleu_by_counting(of_hypotheses, words)
    score = bleu.published_compound_split_bleu(hypotheses, references, "de")
    assert score == pytest.approx(expected)
    for i, changed in {
        0: words[0].replace("&quot; Ja", "„ Ja"),
        2: words[2].replace("usw.", "usw ."),
        5: words[5].replace(" ##AT##-##AT## ", "-"),
    }.items():
        others = [*words[:i], changed, *words[i + 1 :]]
        assert bleu_by_counting(of_hypotheses, others) != pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize(("line", "words"), PUBLISHED)
def test_words_of_the_published_scripts(line: str, words: str) -> None:
    """Recorded from replace-unicode-punctuation.perl, tokenizer.perl 1.1 and the split."""
    assert bleu.split_compounds(bleu._as_published(line, "de")).split() == words.split()


def test_quotes_cost_a_model_less_by_the_published_scripts() -> None:
    references = ["Er sagte: „Das ist ein sehr schöner Tag.“", "Und dann kam sie aus dem Haus."]
    hypotheses = [line.replace("„", '"').replace("“", '"') for line in references]
    assert bleu.published_compound_split_bleu(hypotheses, references, "de") == pytest.approx(100)
    assert bleu.compound_split_bleu(hypotheses, references, "de") < 90


def test_compound_split_bleu_is_recorded_where_asked_for(on_little_text) -> None:
    run = on_little_text("toy_translation", "batch")
    hypotheses = (run.folder.parent / "hypotheses/test.txt").read_text().split("\n")[:-1]
    references = run.corpus.raw_reference("test").read_text().split("\n")[:-1]
    assert run.record.metrics["test"]["bleu_compound_split"] == pytest.approx(
        bleu.compound_split_bleu(hypotheses, references, "en")
    )
    assert run.record.metrics["test"]["bleu_compound_split_published"] == pytest.approx(
        bleu.published_compound_split_bleu(hypotheses, references, "en")
    )


def test_a_folded_model_scores_the_same(on_little_text, capsys) -> None:
    """`evaluate.py RUN --fold`, whose table sets now beside the record; refused for LN."""
    run = on_little_text("toy_language_model", "power")
    record, folder = run.record, run.folder
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


def test_folding_of_layer_norms_is_refused(on_little_text) -> None:
    folder = on_little_text("toy_language_model", "layer").folder
    with pytest.raises(UserError, match=r"no norm of this model can be folded.*LayerNorm"):
        reevaluation.main(folder.parent, [], fold=True)
