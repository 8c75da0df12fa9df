"""Everything that the evaluation and the record of a run need, tried before the training begins."""

import errno
import os
from collections.abc import Iterable
from pathlib import Path

from normexp.config.settings import RunSettings
from normexp.corpora import PreparedCorpus
from normexp.errors import UserError
from normexp.evaluation import translations
from normexp.files import require_writable
from normexp.runs import records
from normexp.runs.folder import RunFolder
from normexp.runs.provenance import utc_now
from normexp.runs.records import Asked, Outcome, Record


def check_end_of_run(
    settings: RunSettings, asked: Asked, corpus: PreparedCorpus, folder: RunFolder
) -> None:
    """Raise UserError, or OSError naming a file, for what would fail only after the training."""
    _check_record(settings, asked, folder)
    for split in settings.evaluation.splits:
        try:
            corpus.words(split), corpus.tokens(split)
        except (ValueError, KeyError) as error:
            raise UserError(f"evaluation.splits: {error}") from None
    if corpus.kind == "translation":
        _check_beam(settings.evaluation.beam, corpus)
        for split in settings.evaluation.splits:
            translations.raw_references(corpus, split, corpus.sentences(split))
        _check_metrics(settings.evaluation.compound_split, corpus)
        _check_writable(folder.hypotheses, settings.evaluation.splits)


def _check_record(settings: RunSettings, asked: Asked, folder: RunFolder) -> None:
    """Write a record as it will be, but for its outcome, through the schema."""
    record = Record.of(asked, Outcome.without_result("failed", "not begun"), utc_now())
    try:
        records.check(record)
    except ValueError as error:
        raise UserError(f"the record of this run could not be written: {error}") from None
    _refuse_folders(
        [records.record_path(settings.results_dir, record), folder.record, folder.finished]
    )


def _check_beam(beam: int, corpus: PreparedCorpus) -> None:
    from fairseq.data import Dictionary

    words = len(Dictionary.load(str(corpus.data_bin / f"dict.{corpus.target_language}.txt")))
    if beam >= words:  # fairseq would search with a narrower one and not say so
        raise UserError(
            f"evaluation.beam={beam} must be less than the {words} entries of the dictionary"
        )


def _check_metrics(compound_split: bool, corpus: PreparedCorpus) -> None:
    """Score one sentence by every metric: packages and rules of the language are there, or not."""
    sentence = ["a well-known sentence ."]
    try:
        plain = translations.plain_text(corpus, sentence)
        translations.bleu_of(corpus, sentence, sentence, plain, plain, compound_split)
    except Exception as error:
        raise UserError(
            f"BLEU of the language {corpus.target_language!r} cannot be computed here "
            f"({type(error).__name__}: {error}); mend the installation, or the corpus's languages"
        ) from error


def _check_writable(folder: Path, splits: Iterable[str]) -> None:
    require_writable(folder)
    names = translations.TOKENISED, translations.DETOKENISED
    _refuse_folders(folder / name.format(split=split) for split in splits for name in names)


def _refuse_folders(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
