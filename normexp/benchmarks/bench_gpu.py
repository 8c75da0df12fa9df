"""Everything that needs a GPU, in one run of at most eight minutes."""

import logging
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from normexp.benchmarks.benchmark_record import conditions
from normexp.benchmarks.gpu.section import Section, run
from normexp.benchmarks.peers import peer_versions
from normexp.errors import UserError
from normexp.files import write_json

logger = logging.getLogger(__name__)

_PACKAGE = "normexp.benchmarks.gpu"
# In the order of what is most wanted, should something end the run. Together eight minutes.
SECTIONS = {
    "copy": Section("Copying within the device's memory", f"{_PACKAGE}.layer_times:copy_rows", 15),
    "kernels": Section(
        "Triton kernels against plain torch in float64", f"{_PACKAGE}.kernels:rows", 45
    ),
    "layers": Section("Layers against nn.LayerNorm", f"{_PACKAGE}.layer_times:rows", 75),
    "translation": Section(
        "Updates of the translation models",
        f"{_PACKAGE}.updates:translation_rows",
        100,
        ("fairseq",),
    ),
    "language_model": Section(
        "Updates of PTB's Tensorized Transformer",
        f"{_PACKAGE}.updates:language_rows",
        35,
        ("fairseq",),
    ),
    "beam_search": Section(
        "Beam search of the IWSLT14 model", f"{_PACKAGE}.decoding:rows", 45, ("fairseq",)
    ),
    "graphs": Section("Training steps replayed from CUDA graphs", f"{_PACKAGE}.graphs:rows", 40),
    "compiled": Section(
        "Kernels against torch.compile", f"{_PACKAGE}.layer_times:compiled_rows", 125
    ),
}


def measure(rehearsal: bool, record: Path, progress: bool) -> dict[str, Any]:
    """Run every section and write what there is to `record` after each row.

    rehearsal: on the CPU in triton's interpreter, in tiny sizes; what is then measured means
    nothing. A section that fails, or takes more than its share of the time, keeps its rows and has
    the reason as `error`; the others go on. Returns what it writes. Raises UserError without a GPU.
    """
    if not rehearsal and not torch.cuda.is_available():
        raise UserError(
            "there is no GPU that torch can use; --rehearsal runs the same in tiny sizes on the CPU"
        )
    result = {
        "what": "a rehearsal on the CPU, whose numbers mean nothing"
        if rehearsal
        else "kernels, layers, graphs, updates and beam search on a GPU",
        "quartiles": "lower, median, upper",
        "rehearsal": rehearsal,
        "peer_versions": peer_versions(),
        "sections": {},
    } | conditions("gpu", {"rehearsal": rehearsal})
    record.parent.mkdir(parents=True, exist_ok=True)
    for name, section in SECTIONS.items():
        result["sections"][name] = {"title": section.title, "rows": [], "skipped": {}, "error": ""}
        _run(section, result["sections"][name], rehearsal, lambda: write_json(record, result))
        write_json(record, result)
    return result


def _run(
    section: Section, content: dict[str, Any], rehearsal: bool, save: Callable[[], None]
) -> None:
    """Fill in the content of a section as its rows come."""
    started = time.monotonic()
    logger.info("%s ...", section.title)
    missing = [package for package in section.needs if find_spec(package) is None]
    if missing:
        content["error"] = f"not run: {', '.join(missing)} is not installed"
    else:
        try:
            for row in run(section, rehearsal):
                if "skipped" in row:
                    content["skipped"][row["skipped"]] = row["reason"]
                else:
                    content["rows"].append(row)
                save()
        except (RuntimeError, TimeoutError) as error:
            content["error"] = str(error)
    content["seconds"] = round(time.monotonic() - started, 1)
    outcome = content["error"] or f"{len(content['rows'])} rows"
    logger.info("  %s in %.0f s", outcome, content["seconds"])
