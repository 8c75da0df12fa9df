"""Faults in adding a corpus of one's own."""

from fault import Fault

ADDING = ("corpora/test_add_corpus",)
SCORES = ("evaluation/test_own_corpora_scores",)

OWN_CORPORA = [
    Fault(
        "corpora/own_corpora.py",
        "return file_hash(self.path) != self.sha256",
        "return False",
        "a source that was changed in place is not noticed",
        ADDING,
    ),
    Fault(
        "corpora/own_corpora.py",
        "return now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino",
        "return now.st_size, now.st_mtime_ns, 0, 0",
        "a change of equal size with its time set back is not noticed",
        ADDING,
    ),
    Fault(
        "corpora/preparation.py",
        "own_corpora.require_version(corpus, digest)",
        "pass",
        "a run on an earlier text goes on with another",
        ADDING,
    ),
    Fault(
        "corpora/held_out.py",
        "unique &= counts[first] == 1",
        "pass",
        "held out pairs are also in train",
        ADDING,
    ),
    Fault(
        "corpora/overlap.py",
        "if count == whole > 0:",
        "if False:",
        "a test set that is part of train is accepted",
        ADDING,
    ),
    Fault(
        "corpora/checked_rows.py",
        "if empty.count and not self.drop_empty:",
        "if False:",
        "pairs with an empty side are left out unasked",
        ADDING,
    ),
    Fault(
        "corpora/adding.py",
        "earlier is None or file_hash(path) != earlier.task_sha256",
        "earlier is None",
        "an edited task is overwritten",
        ADDING,
    ),
    Fault(
        "corpora/binarized.py",
        "UNKNOWN if i == dictionary.unk() else s",
        "s",
        "unknown words of a recovered reference can be matched",
        SCORES,
    ),
    Fault(
        "evaluation/translations.py",
        'tokenized=corpus.text == "tokenized"',
        "tokenized=False",
        "text that came tokenized is tokenized again by sacreBLEU",
        SCORES,
    ),
    Fault(
        "evaluation/translations.py",
        'if corpus.text == "plain":',
        "if False:",
        "words of plain text with their punctuation are scored as tokens",
        SCORES,
    ),
]
