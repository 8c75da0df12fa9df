"""Adding an own corpus: from the user's files to a catalogue entry, prepared data and a task.

A corpus is there, with its copy of the text, or it is not: what goes wrong leaves everything as it
was.
"""

import re
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from normexp.corpora import own_corpora
from normexp.corpora.atomic_stage import locked
from normexp.corpora.binarized import DataBin
from normexp.corpora.catalogue import SPLITS, Corpus
from normexp.corpora.checked_rows import RowChecks
from normexp.corpora.given_texts import GivenTexts, find_texts
from normexp.corpora.hashing import file_hash
from normexp.corpora.held_out import hold_out
from normexp.corpora.overlap import overlaps
from normexp.corpora.own_corpora import Origin, Source
from normexp.corpora.own_request import Request, check_request
from normexp.corpora.own_task import amount, schedule, size_for, task_config
from normexp.corpora.parallel_text import read_rows, write_rows
from normexp.corpora.preparation import failures_explained, prepare
from normexp.corpora.prepared import PreparedCorpus
from normexp.corpora.segmentation import MARKED, check_codes, marks_in, sentencepiece_processor
from normexp.corpora.text import CODES, MODEL, final_text
from normexp.errors import UserError
from normexp.files import whole_file
from normexp.paths import own_folder

MOST_TOKENS = 1024  # fairseq's max_source_positions and max_target_positions
UNSPACED = ("zh", "ja", "th", "lo", "km", "my", "bo", "yue")
FEW_UPDATES = 100
SAMPLE = 2000  # lines by which a text is judged
ESCAPES = re.compile(r"&(apos|quot|amp|lt|gt|#91|#93|#124);")  # of Moses's tokenizer


@dataclass(frozen=True)
class Added:
    """The corpus that was added, and what to tell the user."""

    prepared: PreparedCorpus
    lines: list[str]


def add_corpus(request: Request) -> Added:
    """Add or replace an own corpus: copy the text, prepare it, write its task.

    Raises UserError for whatever makes the text unfit, with the numbers of lines; then nothing has
    changed.
    """
    check_request(request)
    lock = own_folder() / "corpora" / f".{request.name}.lock"
    with failures_explained(own_folder()), locked(lock):
        folder = own_corpora.folder_of(request.name)
        work = own_folder() / "partial" / request.name
        new, old = work / "new", work / "old"
        if old.exists() and not folder.exists():  # an earlier command was killed
            old.rename(folder)
        earlier = _earlier(request)
        try:
            shutil.rmtree(work, ignore_errors=True)
            new.mkdir(parents=True)
            notes = _collect(request, new)
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
            try:
                return _prepared(request, folder, earlier, notes)
            except BaseException:
                shutil.rmtree(folder)
                if old.exists():
                    old.rename(folder)
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
            with suppress(OSError):  # others may be at work there
                work.parent.rmdir()


def _earlier(request: Request) -> Origin | None:
    """The origin of the corpus that is to be replaced. Raises UserError if it is not to be."""
    try:
        found = own_corpora.load_own(request.name)
    except UserError:
        if not request.replace:
            raise
        return None  # damaged: it cannot be read but made anew
    if found and not request.replace:
        raise UserError(
            f"there is a corpus {request.name} already, made by: {found[1].command}. Add --replace "
            "to make it anew, or choose another name"
        )
    return found and found[1]


def _collect(request: Request, folder: Path) -> list[str]:
    """Fill a new corpus folder: texts, codes, entry. Returns what the user should know."""
    data = DataBin.find(request.sources[0]) if request.sources[0].is_dir() else None
    if data:
        files = [data.folder / name for name in data.files()]
    else:
        texts = find_texts(
            request.sources, request.valid, request.test, request.languages, request.columns
        )
        files = [path for given in texts.splits.values() for path in given.files]
        files += filter(None, [request.bpe_codes, request.sentencepiece])
    # Before they are copied: a change meanwhile must not go unnoticed.
    sources = [Source.of(path) for path in files]
    if data:
        entry, notes = _collect_binarized(request, data, folder)
    else:
        entry, notes = _collect_texts(request, texts, folder)
    origin = Origin(command=request.command(), sources=sources)
    own_corpora.write_own(folder, request.name, entry, origin)
    return notes


def _collect_binarized(request: Request, data: DataBin, folder: Path) -> tuple[dict, list[str]]:
    for option in ("valid", "test", "columns", "bpe_codes", "sentencepiece", "bpe_merges"):
        if getattr(request, option):
            raise UserError(
                f"{data.folder} is binarized already: --{option.replace('_', '-')} does not apply"
            )
    languages = list(data.languages or request.languages or ["en"])
    if request.languages and request.languages != languages:
        raise UserError(
            f"{data.folder} is for {' '.join(languages)}, not for "
            f"{' '.join(request.languages)}; fairseq's files name their languages"
        )
    dictionaries = [data.dictionary(side) for side in data.sides()]
    marks = request.segmented or marks_in(dictionaries[-1].symbols)
    files = data.files()
    for name in tqdm(files, f"{request.name} copy", disable=not sys.stderr.isatty()):
        shutil.copyfile(data.folder / name, folder / name)
    entry = _entry(languages, f"fairseq's data folder {data.folder.name}") | {
        "archives": _archives(folder, files),
        "splits": {split: {} for split in SPLITS},
        "binarized": True,
        "segmented": marks,
        "tokenized": request.tokenized or marks != "sentencepiece",
        "joined_dictionary": dictionaries[0] == dictionaries[-1],
    }
    if len(dictionaries) == 1:
        del entry["joined_dictionary"]
    notes = [f"binarized data, {_marks_in_words(marks)}"]
    return entry, notes


def _collect_texts(request: Request, texts: GivenTexts, folder: Path) -> tuple[dict, list[str]]:
    languages = texts.languages
    parallel = len(languages) == 2
    if request.separate_dictionaries and not parallel:
        raise UserError("--separate-dictionaries is for two languages")
    files = {split: [folder / f"{split}.{code}" for code in languages] for split in SPLITS}
    in_tokens = request.tokenized or request.segmented is not None
    checks = RowChecks(in_tokens, request.drop_empty, request.max_words, list(texts.notes))
    for split, given in texts.splits.items():
        write_rows(checks.passed(split, given.where, given.rows()), files[split])
        if not any(text.strip() for (text,) in read_rows(files[split][:1])):
            left_out = checks.notes[len(texts.notes) :]
            raise UserError("; ".join([f"no text in {given.where}", *left_out]))
        if crlf := sum(text.windows_line_ends for text in given.texts):
            checks.notes.append(f"{split}: {crlf:,} lines ended with CR LF; the CR is left out")
    notes = checks.notes
    _check_marks(request, files["train"], languages)
    missing = {split: paths for split, paths in files.items() if split not in texts.splits}
    if missing:
        notes.append(hold_out(files["train"], missing))
    notes += overlaps(files)
    names = [path.name for paths in files.values() for path in paths]
    entry = _entry(languages, f"text of {texts.splits['train'].where}")
    steps = [] if request.tokenized or request.segmented or request.sentencepiece else ["tokenize"]
    entry["splits"] = {
        split: {
            "parts": [{"members": {language: f"{split}.{language}" for language in languages}}],
            "steps": list(steps),
        }
        for split in SPLITS
    }
    if request.bpe_codes:
        check_codes(_text_of(request.bpe_codes), str(request.bpe_codes))
        shutil.copyfile(request.bpe_codes, folder / CODES)
        names.append(CODES)
        entry["bpe_codes"] = CODES
    elif request.sentencepiece:
        sentencepiece_processor(request.sentencepiece.read_bytes())
        shutil.copyfile(request.sentencepiece, folder / MODEL)
        names.append(MODEL)
        entry["sentencepiece"] = MODEL
    elif request.segmented:
        entry["segmented"] = request.segmented
    elif request.bpe_merges is not None:
        entry["bpe_merges"] = request.bpe_merges
    else:
        entry["bpe_merges"] = size_for(parallel, _amount(files["train"])).merges
    # subword-nmt works on tokenized text, sentencepiece on plain text.
    entry["tokenized"] = request.tokenized or request.segmented == "subword_nmt"
    if parallel:
        entry["joined_dictionary"] = not request.separate_dictionaries
    entry["archives"] = _archives(folder, names)
    if steps:
        notes += _about_tokenization(files["train"], languages)
    return entry, notes


def _check_marks(request: Request, train: list[Path], languages: list[str]) -> None:
    """Raise UserError where text in pieces is not said to be so, or the other way round."""
    for path, language in zip(train, languages, strict=True):
        rows = islice(read_rows([path]), SAMPLE)
        tokens = [token for (line,) in rows for token in line.split()]
        marks = marks_in(tokens)
        if marks and not request.segmented:
            raise UserError(
                f"the {language} text looks segmented already ({_marks_in_words(marks)}): add "
                f"--segmented {marks.replace('_', '-')}, by which words are counted and BLEU is "
                "computed on words"
            )
        if request.segmented and not any(map(MARKED[request.segmented], tokens)):
            raise UserError(
                f"--segmented {request.segmented.replace('_', '-')}: no token of the {language} "
                f"text has its mark ({_marks_in_words(request.segmented)}); leave the option out"
            )


def _marks_in_words(marks: str | None) -> str:
    return {
        "subword_nmt": "pieces of words that go on end with @@",
        "sentencepiece": "pieces that begin a word begin with \u2581",
        None: "tokens are words",
    }[marks]


def _about_tokenization(train: list[Path], languages: list[str]) -> list[str]:
    from sacremoses.corpus import NonbreakingPrefixes

    notes = []
    for path, language in zip(train, languages, strict=True):
        if language in UNSPACED:
            notes.append(
                f"{language} is written without blanks, which Moses's tokenizer leaves as it is: "
                "better segment it before (--tokenized) or by a --sentencepiece model"
            )
        elif language not in NonbreakingPrefixes().available_langs:
            notes.append(f"{language} is tokenized by the rules for en: there are none for it")
        first = islice(read_rows([path]), SAMPLE)
        if escaped := sum(bool(ESCAPES.search(line)) for (line,) in first):
            notes.append(
                f"{escaped:,} of the first lines in {language} have escapes as tokenized text has "
                "(&apos;): if it is tokenized, add --tokenized --replace"
            )
    return notes


def _entry(languages: list[str], description: str) -> dict:
    return {
        "kind": "translation" if len(languages) == 2 else "language_model",
        "description": f"own corpus: {description}",
        "licence": "own",
        "languages": languages,
    }


def _archives(folder: Path, names: list[str]) -> dict:
    return {
        name: [
            {
                "file": name,
                "size": (folder / name).stat().st_size,
                "hash": f"sha256:{file_hash(folder / name)}",
                "verified": True,
            }
        ]
        for name in names
    }


def _amount(train: list[Path]) -> int:
    """Sentence pairs of train, or words of a language model's text."""
    rows = read_rows(train)
    if len(train) == 2:
        return sum(1 for _ in rows)
    return sum(len(line.split()) for (line,) in rows)


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text, so not subword-nmt's codes") from None


def _prepared(request: Request, folder: Path, earlier: Origin | None, notes: list[str]) -> Added:
    """Prepare a corpus whose folder is complete, and write its task."""
    corpus, _ = own_corpora.load_own(request.name)
    prepared = prepare(request.name, request.data_dir)
    _check_lengths(corpus, prepared)
    parallel = corpus.is_parallel
    train = prepared.sentences("train") if parallel else prepared.tokens("train")
    size = size_for(parallel, train)
    text = task_config(corpus, prepared, size)
    task = own_corpora.task_file(request.name)
    kept = _write_task(task, text, corpus, earlier)
    own_corpora.remember_task(request.name, text)
    plan = schedule(prepared, size)
    lines = [
        f"{request.name}: {' to '.join(corpus.languages)}, "
        f"{'translation' if parallel else 'language model'}, {amount(prepared)} in train, "
        + ", ".join(f"{prepared.sentences(s):,} lines in {s}" for s in ("valid", "test")),
        *(f"  {note}" for note in notes),
        f"  {_in_words(corpus, prepared)}",
        f"  a copy of the text: {folder}",
    ]
    if kept:
        lines.append(f"  task, kept as you edited it but for the version of the text: {task}")
    else:
        lines.append(
            f"  task: {task} (model {size.model}, {plan.epochs} epochs, about {plan.updates:,} "
            f"updates, warm-up {plan.warmup}; edit it as you like)"
        )
    if plan.updates < FEW_UPDATES:
        lines.append("  so few updates say nothing about a norm: there is too little text")
    return Added(prepared, lines)


def _write_task(path: Path, text: str, corpus: Corpus, earlier: Origin | None) -> bool:
    """Write the task, but keep one that the user has edited; return whether it was kept."""
    edited = path.is_file() and (earlier is None or file_hash(path) != earlier.task_sha256)
    if edited:
        text = re.sub(
            rf"^(\s*corpus:\s*){re.escape(corpus.name)}@[0-9a-f]*",
            rf"\g<1>{own_corpora.pinned(corpus)}",
            path.read_text(encoding="utf-8"),
            flags=re.MULTILINE,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(text)
    return edited


def _check_lengths(corpus: Corpus, prepared: PreparedCorpus) -> None:
    """Raise UserError for sentences of a translation corpus that no model here can read."""
    if not corpus.is_parallel:
        return
    for split, record in prepared.manifest["splits"].items():
        for language, longest in record["longest"].items():
            if longest <= MOST_TOKENS:
                continue
            where = f"a sentence of {split} in {language} has {longest:,} tokens"
            if not corpus.binarized:
                path = final_text(corpus, split, language, prepared.directory / "text")
                rows = enumerate(read_rows([path]), 1)
                number = next(n for n, (line,) in rows if len(line.split()) >= MOST_TOKENS)
                where += f" (line {number:,} of {split}, without lines that were left out)"
            raise UserError(
                f"{where} with its end; a model reads at most {MOST_TOKENS:,}: "
                + ("lower --max-words" if split == "train" else "split or shorten it")
            )


def _in_words(corpus: Corpus, prepared: PreparedCorpus) -> str:
    """How text becomes tokens, in words."""
    types = list(prepared.manifest["dictionary_types"].values())
    if corpus.binarized:
        how = "as binarized"
    elif corpus.bpe_merges:
        how = f"BPE learned with {corpus.bpe_merges:,} merges"
    elif corpus.bpe_codes or corpus.sentencepiece:
        how = "your BPE codes" if corpus.bpe_codes else "your sentencepiece model"
    else:
        how = f"as given, {_marks_in_words(corpus.segmented)}"
    text = {"moses": "tokenized by Moses's rules, ", "tokenized": "your tokens, ", "plain": ""}
    dictionary = (
        f"one dictionary of {types[0]:,} types"
        if corpus.joined_dictionary or len(types) == 1
        else f"dictionaries of {types[0]:,} and {types[1]:,} types"
    )
    return f"{text[corpus.text]}{how}; {dictionary}"
