"""Faults in evaluation and in reports."""

from fault import Fault

SCORES = ("evaluation/test_evaluation",)
WINDOWS = ("evaluation/test_sliding_window",)
CAUSALITY = ("evaluation/test_causality",)
REPORT = ("report/test_report",)

EVALUATION = [
    Fault(
        "evaluation/scores.py",
        'chosen = {"_name": "normexp_cross_entropy", "fused": fused}',
        "chosen = trained",
        "the loss of training counts as likelihood",
        (*SCORES, "evaluation/test_likelihood"),
    ),
    Fault(
        "evaluation/scores.py",
        "if tokens != expected or tokens == 0:",
        "if tokens == 0:",
        "a batch that was left out is no error",
        SCORES,
    ),
    Fault(
        "evaluation/scores.py",
        "words = corpus.words(split) + corpus.sentences(split)",
        "words = corpus.words(split)",
        "ends of lines do not count as words",
        SCORES,
    ),
    Fault(
        "evaluation/bleu.py",
        "BLEU(lowercase=lowercase, ",
        "BLEU(",
        "case counts although it should not",
        SCORES,
    ),
    Fault(
        "evaluation/bleu.py",
        r're.sub(r"(\S)-(\S)",',
        r're.sub(r"(\w)-(\w)",',
        "hyphens beside punctuation are not split",
        SCORES,
    ),
    Fault(
        "evaluation/bleu.py",
        """replace_unicode_punctuation(line, language).replace("„", '"')""",
        "replace_unicode_punctuation(line, language)",
        "opening quotes stay by the published scripts",
        SCORES,
    ),
    Fault(
        "evaluation/bleu.py",
        "return tokenize_before_2018_11(line, language)",
        "return tokenize(line, language)",
        "the last dot is split off by the published scripts",
        SCORES,
    ),
    Fault(
        "evaluation/sliding_window.py",
        "max(0, first - context_window)",
        "max(0, first - context_window + 1)",
        "one token of context too few",
        WINDOWS,
    ),
    Fault(
        "evaluation/sliding_window.py",
        "kept[: len(kept) - count] = pad",
        "pass",
        "the context of a window is scored twice",
        WINDOWS,
    ),
    Fault(
        "evaluation/sliding_window.py",
        'torch.cat([blocks[0]["source"][:1], targets[:-1]])',
        "torch.cat([targets[:1], targets[:-1]])",
        "the text begins with its own first word",
        WINDOWS,
    ),
    Fault(
        "evaluation/causality.py",
        "later = at > at[:, None]",
        "later = at >= at[:, None]",
        "the present counts as the future",
        CAUSALITY,
    ),
    Fault(
        "evaluation/causality.py",
        "_log_probs(loaded, other)[:, : cut + 1]",
        "_log_probs(loaded, other)[:, :cut + 0]",
        "the position before the replaced ones is left out",
        CAUSALITY,
    ),
    Fault(
        "report/aggregate.py",
        "statistics.stdev(self.values.values())",
        "statistics.pstdev(self.values.values())",
        "the standard deviation is of a population",
        REPORT,
    ),
    Fault(
        "report/aggregate.py",
        "t.ppf(0.975, self.n - 1)",
        "t.ppf(0.975, self.n)",
        "one degree of freedom too many",
        REPORT,
    ),
    Fault(
        "report/aggregate.py",
        "ours.values[seed] - theirs.values[seed]",
        "theirs.values[seed] - ours.values[seed]",
        "differences have the wrong sign",
        REPORT,
    ),
    Fault(
        "report/aggregate.py",
        "better = (low > 0) == (self.metric in HIGHER_IS_BETTER)",
        "better = low > 0",
        "a higher perplexity is better",
        REPORT,
    ),
    Fault(
        "report/aggregate.py",
        "if row.setting != baseline.setting:",
        "if False:",
        "rows of other budgets are compared",
        REPORT,
    ),
]
