"""Faults in the preparation of corpora."""

from fault import Fault

DOWNLOAD = ("corpora/test_download",)
CLEANING = ("corpora/test_cleaning",)
PREPARATION = ("corpora/test_preparation",)
TOKENIZATION = ("corpora/test_tokenization",)
DIFFERENCES = ("corpora/test_expected_counts",)
TEST_SETS = ("corpora/test_test_sets",)

CORPORA = [
    Fault(
        "corpora/download.py",
        "if actual != digest:",
        "if False:",
        "a file with another hash is used",
        DOWNLOAD,
    ),
    Fault(
        "corpora/download.py",
        "file.truncate(0)",
        "pass",
        "a server that sends the whole file gets it appended",
        DOWNLOAD,
    ),
    Fault(
        "corpora/download.py",
        "if path.exists() and _defect(path, archive) is None:",
        "if path.exists():",
        "a damaged file from before is used",
        DOWNLOAD,
    ),
    Fault(
        "corpora/download.py",
        "if target.tell() > limit:",
        "if False:",
        "a packed file is unpacked however large it becomes",
        DOWNLOAD,
    ),
    Fault(
        "corpora/cleaning.py",
        "if target_words / source_words > max_ratio or source_words",
        "if target_words / source_words >= max_ratio or source_words",
        "pairs of exactly the largest ratio are dropped",
        CLEANING,
    ),
    Fault(
        "corpora/cleaning.py",
        "and min_words <= target_words <= max_words):",
        "):",
        "long targets are kept",
        CLEANING,
    ),
    Fault(
        "corpora/cleaning.py",
        "if not factored:",
        "if factored:",
        "bars are deleted in factored text and kept in other text",
        CLEANING,
    ),
    Fault(
        "corpora/preparation.py",
        'or manifest.get("fingerprint") != fingerprint',
        "",
        "a changed recipe finds the old corpus",
        PREPARATION,
    ),
    Fault(
        "corpora/preparation.py",
        'if changed := changed_files(directory, manifest["files"]):',
        "if changed := []:",
        "lost files are not made again",
        PREPARATION,
    ),
    Fault(
        "corpora/preparation.py",
        "if _counts_of_stages(directory) not in (None, _counts(manifest)):",
        "if False:",
        "words counted in an edited manifest divide a perplexity",
        ("runs/test_evidence",),
    ),
    Fault(
        "corpora/preparation.py",
        """if path.suffix in (".bin", ".idx") and""",
        "if False and",
        "data put beside the corpus are trained on",
        ("runs/test_evidence",),
    ),
    Fault(
        "corpora/tokenization.py",
        r'_ALNUM = rf"[[\p{{Alphabetic}}\p{{Nd}}]--{_LETTERS_SINCE_15}]"',
        r'_ALNUM = r"[\p{Alphabetic}\p{Nd}]"',
        "letters are those of the newest Unicode",
        TOKENIZATION,
    ),
    Fault(
        "corpora/tokenization.py",
        r"[[\p{Lowercase}\u0295]--",
        r"[[\p{Ll}\u0295]--",
        "small letters in circles are none",
        TOKENIZATION,
    ),
    Fault(
        "corpora/tokenization.py",
        "(re.compile(pattern, re.ASCII), by)",
        "(re.compile(pattern), by)",
        "digits of all scripts count as the normalizer's",
        TOKENIZATION,
    ),
    Fault(
        "corpora/expected_counts.py",
        'return other.split == "train" and (self.split is None or self.stage >= _SEGMENTED)',
        'return other.split == "train"',
        "the train text is to blame for the test set's",
        DIFFERENCES,
    ),
    Fault(
        "corpora/text.py",
        "shutil.copyfile(trained / CODES, folder / CODES)",
        "learn_bpe(corpus, folder, progress)",
        "a further test set has BPE codes of its own",
        TEST_SETS,
    ),
]
