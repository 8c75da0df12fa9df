"""Time and memory of WMT14's preparation: the real chain on made-up text."""

import gzip
import logging
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from normexp.benchmarks.benchmark_record import write_record
from normexp.benchmarks.preparation_peers import compare
from normexp.benchmarks.wmt_like import pairs
from normexp.corpora.binarization import build_binary
from normexp.corpora.catalogue import CLEAN, SPLITS, Archive, Corpus, Part, load_catalogue
from normexp.corpora.hashing import file_hash
from normexp.corpora.parallel_text import BLOCK_ROWS, open_text, read_rows
from normexp.corpora.preparation import build_raw
from normexp.corpora.process_pool import available_cores
from normexp.corpora.text import CODES, TOKENIZED, learn_bpe, segment_splits, tokenize_splits
from normexp.corpora.tokenization import apply_step
from normexp.errors import UserError

CORPUS = "wmt14"
BYTES_PER_PAIR = 2500  # of disk space
_EVALUATION_PAIRS = 3000  # of valid and of test, as in newstest2013
_SAMPLE = 5000  # lines on which the steps are timed one by one
_INTERVAL = 0.25  # seconds between two looks at the memory

log = logging.getLogger(__name__)


def measure(
    pairs: int, seed: int, folder: Path | None, record: Path, progress: bool
) -> dict[str, Any]:
    """Prepare `pairs` generated sentence pairs in a temporary folder; write to `record`.

    folder: where the temporary folder is made (default: the system's). Returns what
    `measure_stages` does. Raises UserError where there is not enough disk space.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        free, needed = shutil.disk_usage(temporary).free, pairs * BYTES_PER_PAIR
        if free < needed:
            raise UserError(
                f"{needed / 1e9:.1f} GB are needed in {temporary}, {free / 1e9:.1f} GB are free; "
                "make room, choose another --folder or fewer --pairs"
            )
        return measure_stages(pairs, seed, Path(temporary), record, progress)


def measure_stages(
    number: int, seed: int, folder: Path, record: Path, progress: bool
) -> dict[str, Any]:
    """Prepare `number` generated training pairs below `folder`, which is left behind, in stages.

    Writes to `record`, and returns, seconds, pairs per second and peak memory (bytes, of this
    process and its children together) of every stage, lines per second of each text step in one
    process, the time of steps beside that of the software that they stand for, and what the times
    mean for the real corpus. Memory is Linux's proportional set size: pages shared by several
    processes count once.
    """
    recipe = load_catalogue()[CORPUS]
    real = recipe.expected.splits["train"]["raw_sentences"]
    workers = available_cores()
    # In a process of its own, so that the generator's memory is not counted.
    generator = multiprocessing.get_context("spawn").Process(
        target=_generate, args=(number, seed, folder / "archives", progress)
    )
    generator.start()
    generator.join()
    if generator.exitcode:
        raise RuntimeError(f"the generator of the text ended with status {generator.exitcode}")
    corpus = _with_archives(recipe, folder / "archives")
    raw, text, data_bin = (folder / name for name in ("raw", "text", "data-bin"))
    stages: dict[str, dict[str, float]] = {}

    def run(name: str, make: Callable[[], Any]) -> Any:
        with _peak_memory() as peak:
            start = time.perf_counter()
            result = make()
            seconds = time.perf_counter() - start
        stages[name] = {
            "seconds": round(seconds, 1),
            "pairs_per_second": round(number / seconds),
            "peak_memory_bytes": peak[0],
        }
        log.info(
            "%-28s %8.1f s %9.0f pairs/s %6.2f GB", name, seconds, number / seconds, peak[0] / 1e9
        )
        return result

    for path in (raw, text, data_bin):
        path.mkdir(parents=True)
    steps = [step for step in corpus.splits["train"].steps if step != CLEAN]
    run("unpack", lambda: build_raw(corpus, folder, raw, folder / "archives", progress))
    run("normalize, tokenize, clean",
        lambda: tokenize_splits(corpus, raw, text, workers, progress))  # fmt: skip
    run("learn BPE", lambda: learn_bpe(corpus, text, progress))
    run("apply BPE", lambda: segment_splits(corpus, text, workers, progress))
    binary = run("binarize", lambda: build_binary(corpus, text, data_bin, workers, progress))

    total = sum(stage["seconds"] for stage in stages.values())
    scale = real / number
    types = _word_types(corpus, text)
    # Learning BPE holds the different words, everything else a bounded number of lines.
    unpacking, learning = (stages[name]["peak_memory_bytes"] for name in ("unpack", "learn BPE"))
    bytes_per_type = (learning - unpacking) / types
    sample = _sample(corpus, raw)
    peers, skipped = compare(sample, (text / CODES).read_text("utf-8"), workers)
    result = {
        "corpus": f"generated, with the recipe of {CORPUS}",
        "pairs": number,
        "seed": seed,
        "pairs_after_the_filter": binary["splits"]["train"]["sentences"],
        "words_per_sentence": {
            language: round(_words(raw / f"train.{language}") / number, 1)
            for language in corpus.languages
        },
        "word_types_joint": types,
        "bpe_merges": corpus.bpe_merges,
        "dictionary_types": binary["dictionary_types"],
        "processes": workers,
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "stages": stages,
        "total_seconds": round(total, 1),
        "peak_memory_bytes": max(stage["peak_memory_bytes"] for stage in stages.values()),
        "lines_per_second_of_one_process": _rates_of_steps(sample, steps),
        "peers": peers,
        "skipped": skipped,
        "real_corpus": {
            "pairs": real,
            # Linear; for learning BPE that is too much, since the number of different words
            # grows more slowly than the text.
            "hours_at_most": round(total * scale / 3600, 2),
            "learn_bpe_bytes_per_word_type": round(bytes_per_type),
            "word_types_that_fit_into_4_gb": round((4e9 - unpacking) / bytes_per_type),
        },
    }
    return write_record(record, "preparation", {"pairs": number, "seed": seed}, result)


def _generate(number: int, seed: int, folder: Path, progress: bool) -> None:
    folder.mkdir(parents=True)
    sizes = {"train": number, "valid": _EVALUATION_PAIRS, "test": _EVALUATION_PAIRS}
    for split_seed, (split, size) in enumerate(sizes.items(), seed):
        rows = tqdm(pairs(split_seed, size), f"generate {split}", size, disable=not progress)
        with (
            gzip.open(folder / f"{split}.en.gz", "wt", 1, "utf-8", newline="\n") as english,
            gzip.open(folder / f"{split}.de.gz", "wt", 1, "utf-8", newline="\n") as german,
        ):
            for source, target in rows:
                english.write(source + "\n")
                german.write(target + "\n")


def _with_archives(recipe: Corpus, folder: Path) -> Corpus:
    """The recipe with every split read from ``<split>.<language>.gz``."""
    archives, splits = {}, {}
    for split in SPLITS:
        members = {language: f"{split}.{language}" for language in recipe.languages}
        splits[split] = recipe.splits[split].model_copy(update={"parts": [Part(members=members)]})
        for member in members.values():
            file = f"{member}.gz"
            archives[member] = [Archive(file=file, hash=f"sha256:{file_hash(folder / file)}")]
    return recipe.model_copy(update={"archives": archives, "splits": splits})


@contextmanager
def _peak_memory() -> Iterator[list[int]]:
    """A list of one item: at the end, the most bytes that this process and those below it held."""
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.is_set():
            peak[0] = max(peak[0], _memory_of_tree())
            ended.wait(_INTERVAL)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()


def _memory_of_tree() -> int:
    """Bytes, proportional set size, of this process and all below it."""
    total, pending = 0, [os.getpid()]
    while pending:
        process = Path("/proc") / str(pending.pop())
        try:
            rollup = (process / "smaps_rollup").read_text()
            total += next(
                int(line.split()[1]) << 10 for line in rollup.split("\n") if line.startswith("Pss:")
            )
            for task in (process / "task").iterdir():
                pending += map(int, (task / "children").read_text().split())
        except OSError:  # it has just ended
            continue
    return total


def _sample(corpus: Corpus, raw: Path) -> dict[str, list[str]]:
    """The first lines of train in each language."""
    lines = {}
    for language in corpus.languages:
        with open_text(raw / f"train.{language}") as file:
            lines[language] = [line.removesuffix("\n") for line in islice(file, _SAMPLE)]
    return lines


def _rates_of_steps(sample: dict[str, list[str]], steps: list[str]) -> dict[str, dict[str, int]]:
    """Lines per second of each step in one process, which has seen none of the lines before."""
    rates: dict[str, dict[str, int]] = {step: {} for step in steps}
    for language, lines in sample.items():
        blocks = [lines[n : n + BLOCK_ROWS] for n in range(0, len(lines), BLOCK_ROWS)]
        for step in steps:
            apply_step(step, ["-"], language)  # what is made once per process is made here
            start = time.perf_counter()
            blocks = [apply_step(step, block, language) for block in blocks]
            rates[step][language] = round(len(lines) / (time.perf_counter() - start))
    return rates


def _words(path: Path) -> int:
    with open_text(path) as file:
        return sum(len(line.split()) for line in file)


def _word_types(corpus: Corpus, text: Path) -> int:
    types: set[str] = set()
    for row in read_rows([text / TOKENIZED / f"train.{lang}" for lang in corpus.languages]):
        for line in row:
            types.update(line.split())
    return len(types)
