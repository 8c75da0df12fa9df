"""Steps of a preparation beside the software that they stand for, on the same text."""

import importlib.util
import io
import shutil
import subprocess
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import subword_nmt.learn_bpe
from subword_nmt.apply_bpe import BPE

from normexp.benchmarks.timing import interleave
from normexp.corpora import tokenization
from normexp.corpora.bpe import learn_codes
from normexp.corpora.parallel_text import BLOCK_ROWS
from normexp.corpora.process_pool import map_blocks
from normexp.corpora.segmentation import BpeSegmenter

_ROUNDS = 5
_MERGES = 2000
_LEARNT_LINES = 2000  # per language; the library is slow


def compare(
    raw: Mapping[str, list[str]], codes: str, workers: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Measure the steps on raw lines of each language, with codes for them.

    Returns what was measured, with quartiles of the ratio of our time to the peer's, and the peers
    that cannot run here, each with the reason. All times begin with empty dictionaries.
    """
    measured, skipped = [], {}

    def measure(what: str, peer: str, ours: Callable[[], Any], theirs: Callable[[], Any]) -> None:
        timings = interleave({"ours": ours, "peer": theirs}, _ROUNDS, progress=False)
        ratio = [round(value, 3) for value in timings.ratios("ours", "peer")]
        measured.append({"what": what, "peer": peer, "ratio": ratio} | timings.rounds)

    scripts = moses_scripts()
    if isinstance(scripts, str):
        skipped["Moses' Perl scripts"] = scripts
    else:
        for language, lines in raw.items():
            measure(
                f"normalize and tokenize, {language}",
                "Moses' Perl scripts",
                lambda lines=lines, language=language: tokenized(lines, language),
                lambda lines=lines, language=language: by_scripts(scripts, lines, language),
            )
    texts = {language: tokenized(lines, language) for language, lines in raw.items()}
    few = [line for lines in texts.values() for line in lines[:_LEARNT_LINES]]
    measure("learn BPE", "subword-nmt", lambda: _learn(few), lambda: _learn_by_library(few))
    lines = [line for lines in texts.values() for line in lines]
    blocks = [[lines[n : n + BLOCK_ROWS]] for n in range(0, len(lines), BLOCK_ROWS)]

    def segment(processes: int) -> None:
        for _ in map_blocks(BpeSegmenter(codes, 1), blocks, processes):
            pass

    measure(
        "apply BPE", "subword-nmt", lambda: segment(1), lambda: _segment_by_library(codes, lines)
    )
    if workers > 1:
        measure(
            f"apply BPE, {workers} processes", "one process",
            lambda: segment(workers), lambda: segment(1),
        )  # fmt: skip
    return measured, skipped


def moses_scripts() -> list[Path] | str:
    """normalize-punctuation.perl and tokenizer.perl of the package mosestokenizer, or why not."""
    package = importlib.util.find_spec("mosestokenizer")
    if package is None or package.origin is None:
        return "mosestokenizer is not installed"
    if shutil.which("perl") is None:
        return "no perl"
    folder = Path(package.origin).parent
    return [folder / "normalize-punctuation.perl", folder / "tokenizer-v1.1.perl"]


def by_scripts(scripts: list[Path], lines: list[str], language: str) -> list[str]:
    """What the scripts make of the lines, one after the other; they are the versions of 2017."""
    text = "".join(f"{line}\n" for line in lines).encode()
    for script in scripts:
        quiet = ["-q"] if "tokenizer" in script.name else []
        command = ["perl", str(script), "-l", language, *quiet]
        text = subprocess.run(command, input=text, stdout=subprocess.PIPE, check=True).stdout
    return text.decode().split("\n")[:-1]


def tokenized(lines: list[str], language: str) -> list[str]:
    """What our steps make of the lines."""
    tokenization._chunk_tokenizer.cache_clear()
    result = []
    for begin in range(0, len(lines), BLOCK_ROWS):
        block = lines[begin : begin + BLOCK_ROWS]
        for step in ("normalize_punctuation", "tokenize"):
            block = tokenization.apply_step(step, block, language)
        result += block
    return result


def _learn(lines: list[str]) -> None:
    learn_codes(lines, io.StringIO(), _MERGES, progress=False)


def _learn_by_library(lines: list[str]) -> None:
    with redirect_stderr(io.StringIO()):  # its progress bar
        subword_nmt.learn_bpe.learn_bpe(lines, io.StringIO(), _MERGES)


def _segment_by_library(codes: str, lines: list[str]) -> None:
    bpe = BPE(io.StringIO(codes))
    for line in lines:
        bpe.process_line(line)
