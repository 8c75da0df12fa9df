"""Faults in the preparation of corpora."""

from fault import Fault

DOWNLOAD = ("corpora/test_download",)
CLEANING = ("corpora/test_cleaning",)
PREPARATION = ("corpora/test_preparation",)

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
]
