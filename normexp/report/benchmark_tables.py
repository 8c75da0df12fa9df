"""The tables of `results/benchmarks/README.md`, from the records of scripts/benchmark.py."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from normexp.errors import UserError, invalid_fields
from normexp.files import Unreadable, read_json, read_yaml
from normexp.report import formatting
from normexp.report.goals import Goal, load_goals
from normexp.report.table import Cell, Note, Table

Content = dict[str, Any]  # of a record
_DISTURBED = "≈"
_NOT_QUIET = Note(f"{_DISTURBED} other processes ran meanwhile; all rounds are kept.")


@dataclass(frozen=True, kw_only=True)
class Quoted:
    """Times of the authors' layers in milliseconds: one number, or minimum and maximum."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    software: str
    malloc: str
    layer_norm: list[float]
    power: list[float]
    batch: list[float]


@dataclass(frozen=True, kw_only=True)
class Authors:
    """Quoted measurements of the authors' code."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    what: str
    source: str
    machine: str
    measured: list[Quoted]


@dataclass(frozen=True)
class Benchmarks:
    """The records of all benchmarks.

    Attributes:
        records: In the order of the page, by the file's name without ".json": the benchmark's, or
            that of the same benchmark under another condition, as in norms-tuned.
        authors: Quoted times of the authors' layers; None if there is no file of them.
        goals: What is wanted of the numbers.
    """

    records: dict[str, Content]
    authors: Authors | None = None
    goals: list[Goal] = field(default_factory=list)


def load_benchmarks(results: Path) -> Benchmarks:
    """Read the folder `results`/benchmarks; raises UserError that names an invalid file."""
    folder = results / "benchmarks"
    records = {}
    for path in sorted(folder.glob("*.json")):
        if benchmark_of(path.stem) not in TITLES:
            raise UserError(f"{path}: no such benchmark; known: {', '.join(TITLES)}")
        try:
            records[path.stem] = read_json(path)
            tables(benchmark_of(path.stem), records[path.stem])
            environment(records[path.stem])
        except KeyError as error:
            raise UserError(f"{path}: {error} is missing; measure again") from None
        except Unreadable as error:
            raise UserError(f"{error}; measure again") from None
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
            raise UserError(f"{path}: not a record of this benchmark ({error})") from None
    path = folder / "authors.yaml"
    authors = None
    if path.is_file():
        try:
            authors = TypeAdapter(Authors).validate_json(json.dumps(read_yaml(path)))
        except Unreadable as error:
            raise UserError(str(error)) from None
        except ValidationError as error:
            raise UserError(f"{path}: {invalid_fields(error)}") from None
    ordered = sorted(records, key=lambda name: ([*TITLES].index(benchmark_of(name)), name))
    return Benchmarks(
        {name: records[name] for name in ordered}, authors, load_goals(folder / "goals.yaml")
    )


def benchmark_of(name: str) -> str:
    """Give the benchmark of a record, from its file's name without ".json"."""
    return name.partition("-")[0]


def title_of(name: str) -> str:
    """Give the heading of a record, from its file's name without ".json"."""
    benchmark, _, condition = name.partition("-")
    return f"{TITLES[benchmark]}, {condition}" if condition else TITLES[benchmark]


def tables(benchmark: str, record: Content) -> list[tuple[str, Table]]:
    """Give the titles and tables of a record; raises KeyError if a value is missing.

    Below the last one stands what the record says was `skipped`.
    """
    found = _TABLES[benchmark](record)
    title, last = found[-1]
    notes = [*last.notes, *_left_out(record.get("skipped", {}))]
    return [*found[:-1], (title, replace(last, notes=notes))]


def authors_table(authors: Authors) -> Table:
    """Tabulate the times of the authors' layers, also as multiples of nn.LayerNorm's."""
    lines: list[list[Cell]] = [
        [
            one.software,
            one.malloc,
            *(_range(times) for times in (one.layer_norm, one.power, one.batch)),
            *(_times(times, one.layer_norm) for times in (one.power, one.batch)),
        ]
        for one in authors.measured
    ]
    header = ["software", "malloc", "LN, ms", "power, ms", "batch, ms", "power / LN", "batch / LN"]
    return Table(header, lines)


def environment(record: Content) -> str:
    """Name machine, threads, malloc, versions, commit and day on one line."""
    facts, versions, malloc = record["hardware"], record["versions"], record.get("malloc")
    if isinstance(malloc, Mapping):
        malloc = " ".join(f"{name}={value}" for name, value in malloc.items())
    changed = " with changes" if record["code_dirty"] else ""
    return "; ".join(
        [
            formatting.hardware(facts),
            f"{facts['num_threads']} thread{'s' * (facts['num_threads'] != 1)}",
            f"malloc {malloc or 'not recorded'}",
            f"Python {versions['python']}, torch {versions['torch']}, "
            f"fairseq-fixed {versions['fairseq-fixed']}",
            f"commit {record['code_commit'][:7]}{changed}",
            record["measured_at"][:10],
        ]
    )


def _norms(record: Content) -> list[tuple[str, Table]]:
    found = [
        (
            f"Forward and backward in {dtype}, as multiples of nn.LayerNorm's",
            _pivot(rows, "layer", "shape", _norm_cell),
        )
        for dtype, rows in _grouped(record["measured"], "dtype")
    ]
    beside_authors = [row for row in record["measured"] if "ratio_to_authors" in row]
    if beside_authors:
        table = _pivot(
            beside_authors, "layer", "shape", lambda row: _ratio(row, "ratio_to_authors", 3)
        )
        found.append(("The same in float32, as multiples of the authors' layer's time", table))
    return found


def _norm_cell(row: Content) -> str:
    return f"{_ratio(row, 'ratio_to_layer_norm')} · {row['milliseconds']:.3g} ms"


def _scaling(record: Content) -> list[tuple[str, Table]]:
    tables_of = []
    for sweep, rows in _grouped(record["measured"], "sweep"):
        if sweep == "groups":
            tables_of.append(("Over groups", _pivot(rows, "layer", "dtype", _scaling_cell)))
            continue
        for dtype, same in _grouped(rows, "dtype"):
            title = f"Over {sweep}, {dtype}"
            tables_of.append((title, _pivot(same, "layer", sweep, _scaling_cell)))
    return tables_of


def _scaling_cell(row: Content) -> str:
    nanoseconds = row["nanoseconds_per_element"][1]
    return f"{_ratio(row, 'ratio_to_layer_norm')} · {nanoseconds:.3g} ns"


def _training(record: Content) -> list[tuple[str, Table]]:
    columns = {
        "configuration": lambda row: row["configuration"],
        "ms per update": lambda row: f"{row['milliseconds']:.1f}",
        "times faster than fairseq": lambda row: _ratio(row, "speedup_over_stock"),
        "tokens per second": lambda row: formatting.count(row["tokens_per_second"]),
        "loss, nats per token": lambda row: f"{row['loss']:.4f}",
    }
    profile = {
        "operator": lambda row: row["what"],
        "share": lambda row: f"{100 * row['share']:.1f} %",
        "ms": lambda row: f"{row['ms']:.1f}",
    }
    kept = record.get("memory_kept", {}).get("measured", [])  # older records have none
    return [
        ("", _listed(record["measured"], columns)),
        *(
            [("Where malloc keeps freed memory, as in train.py", _listed(kept, columns))]
            * bool(kept)
        ),
        *(
            (f"Where an update of “{name}” spends its time", _listed(rows, profile))
            for name, rows in record["profiles"].items()
        ),
    ]


def _inference(record: Content) -> list[tuple[str, Table]]:
    columns = {
        "beam search": _search_cell,
        "beam": lambda row: str(row["beam"]),
        "sentences": lambda row: formatting.count(row["sentences"]),
        "unlike the other": lambda row: formatting.count(row["different_hypotheses"]),
        "sentences per second": lambda row: f"{row['sentences_per_second']:.1f}",
        "time / fairseq's": lambda row: _ratio(row, "ratio_to_fairseq"),
    }
    return [
        *(
            (
                f"Encoder in {dtype}, sentences x tokens, as multiples of LN's",
                _pivot(rows, "norm", "batch", _norm_cell),
            )
            for dtype, rows in _grouped(record["encoder"], "dtype")
        ),
        ("Beam search", _listed(record["beam_search"], columns)),
    ]


def _search_cell(row: Content) -> str:
    # Older records have one number of threads only, which stands above the tables.
    return f"{row['search']} (threads: {row['threads']})" if "threads" in row else row["search"]


def _data(record: Content) -> list[tuple[str, Table]]:
    columns = {
        "task": lambda row: row["task"],
        "part": lambda row: row["part"],
        "ms per batch": lambda row: _quartiles(row["milliseconds_per_batch"]),
        "batches per second": lambda row: f"{row['batches_per_second']:,.1f}",
        "tokens per second": lambda row: formatting.count(row["tokens_per_second"]),
        "time / step's": lambda row: _ratio(row, "ratio_to_step", 4),
    }
    return [("", _listed(record["measured"], columns))]


def _diagnostics(record: Content) -> list[tuple[str, Table]]:
    columns = {
        "norm at all sites": lambda row: row["norm"],
        "values": lambda row: str(row["values"]),
        "ms per update": lambda row: _quartiles(row["milliseconds_per_update"]),
        "ms of diagnostics": lambda row: _quartiles(row["milliseconds_of_diagnostics"]),
        "update with / without": lambda row: _ratio(row, "ratio_with_to_without"),
        "share of a logged update": lambda row: f"{100 * row['share_of_logged_update'][1]:.2f} %",
        "share of training": lambda row: (
            f"{100 * row['share_of_training'][1]:.3f} % (every {row['log_interval']} updates)"
        ),
    }
    return [("", _listed(record["measured"], columns))]


def _attention(record: Content) -> list[tuple[str, Table]]:
    columns = {
        "shape": lambda row: row["shape"],
        "attention": lambda row: row["attention"],
        "ours, µs per token": lambda row: f"{row['microseconds_per_token']['ours'][1]:.1f}",
        "einsum, µs per token": lambda row: f"{row['microseconds_per_token']['einsum'][1]:.1f}",
        "ours / einsum": lambda row: _ratio(row, "ratio_of_ours_to_einsum"),
        "ours, MB": lambda row: f"{row['memory_bytes']['ours'] / 1e6:.0f}",
        "einsum, MB": lambda row: f"{row['memory_bytes']['einsum'] / 1e6:.0f}",
    }
    return [("", _listed(record["measured"], columns))]


def _ranks(record: Content) -> list[tuple[str, Table]]:
    columns = {
        "layer": lambda row: row["layer"],
        "collectives in a step": lambda row: str(row["collectives"]),
        "ms per step": lambda row: _quartiles(row["milliseconds"]),
        "time / LN's": lambda row: _ratio(row, "ratio_to_layer"),
    }
    shape = " × ".join(map(str, record["shape"]))
    title = f"{record['layers']} layers on {record['ranks']} ranks, {shape} on each"
    return [(title, _listed(record["measured"], columns))]


def _preparation(record: Content) -> list[tuple[str, Table]]:
    stages: list[list[Cell]] = [
        [
            name,
            f"{stage['seconds']:.1f}",
            formatting.count(stage["pairs_per_second"]),
            f"{stage['peak_memory_bytes'] / 1e9:.2f}",
        ]
        for name, stage in record["stages"].items()
    ]
    steps: list[list[Cell]] = [
        [step, language, formatting.count(rate)]
        for step, rates in record["lines_per_second_of_one_process"].items()
        for language, rate in rates.items()
    ]
    real = record["real_corpus"]
    note = Note(
        f"{record['pairs']:,} generated pairs in {record['total_seconds']:.0f} s by "
        f"{record['processes']} processes; WMT14's {real['pairs']:,} would take at most "
        f"{real['hours_at_most']:.1f} hours."
    )
    return [
        ("Stages", Table(["stage", "seconds", "pairs per second", "peak GB"], stages, [note])),
        ("Steps in one process", Table(["step", "language", "lines per second"], steps)),
        *_preparation_peers(record.get("peers", [])),  # there were none at first
    ]


def _preparation_peers(peers: list[Content]) -> list[tuple[str, Table]]:
    columns = {
        "step": lambda row: row["what"],
        "beside": lambda row: row["peer"],
        "time / the other's": lambda row: _ratio(row, "ratio"),
    }
    return [("Steps beside other software", _listed(peers, columns))] if peers else []


def _gpu(record: Content) -> list[tuple[str, Table]]:
    found: list[tuple[str, Table]] = []
    for name, make in _GPU_TABLES.items():
        if name not in record["sections"]:  # the run has not come so far
            continue
        section = record["sections"][name]
        tables_of = make(section["rows"]) if section["rows"] else []
        title, last = tables_of[-1] if tables_of else ("", Table(["nothing was measured"], []))
        notes = [*last.notes, *_left_out(section["skipped"])]
        if section["error"]:
            notes.append(Note(f"Not complete: {section['error']}"))
        tables_of = [*tables_of[:-1], (title, replace(last, notes=notes))]
        found += [
            (f"{section['title']}{': ' * bool(title)}{title}", table) for title, table in tables_of
        ]
    return found


def _gpu_copy(rows: list[Content]) -> list[tuple[str, Table]]:
    columns = {
        "MB": lambda row: f"{row['bytes'] / 1e6:.0f}",
        "read and written, GB/s": lambda row: f"{row['bytes_per_second'] / 1e9:.0f}",
    }
    return [("", _listed(rows, columns))]


def _gpu_kernels(rows: list[Content]) -> list[tuple[str, Table]]:
    outputs = ("y", "dL/dx", "dL/dw", "dL/db")

    def largest(values: Content, names: Iterable[str]) -> str:
        return f"{max((values[name] for name in names if name in values), default=0.0):.2g}"

    columns = {
        "kernel": lambda row: row["kernel"],
        "dtype": lambda row: row["dtype"],
        **{f"error of {name}": lambda row, n=name: largest(row["errors"], [n]) for name in outputs},
        "of the state": lambda row: largest(row["errors"], {*row["errors"]} - {*outputs}),
        "at most": lambda row: (
            f"{largest(row['tolerances'], outputs[:2])}, sums "
            f"{largest(row['tolerances'], outputs[2:])}"
        ),
        "repeats to the bit": lambda row: "yes" if row["repeats"] else "NO",
        "passed": lambda row: "yes" if row["passed"] else f"NO {row['failure']}".strip(),
    }
    return [("", _listed(rows, columns))]


def _gpu_layers(rows: list[Content]) -> list[tuple[str, Table]]:
    return [
        (
            f"{what}, {dtype}, as multiples of nn.LayerNorm's",
            _pivot(same, "layer", "shape", _gpu_cell),
        )
        for what, of_what in _grouped(rows, "what")
        for dtype, same in _grouped(of_what, "dtype")
    ]


def _gpu_cell(row: Content) -> str:
    rate = row["bytes_per_second"] / 1e9
    ratio = _ratio(row, "ratio_to_layer_norm")
    return f"{ratio} · {row['microseconds']:.4g} µs · {rate:.0f} GB/s"


def _gpu_updates(rows: list[Content]) -> list[tuple[str, Table]]:
    columns = {
        "configuration": lambda row: row["configuration"],
        "ms per update": lambda row: _quartiles(row["milliseconds"]),
        "tokens per second": lambda row: formatting.count(row["tokens_per_second"]),
        "peak GB": lambda row: _gigabytes(row["peak_memory_bytes"]),
        f"time / that of {rows[0]['baseline']}": lambda row: (
            _ratio(row, "ratio") if row["ratio"] else ""
        ),
    }
    if "hours" in rows[0]:
        columns["hours of all updates"] = lambda row: f"{row['hours']:.2f} ({row['updates']:,})"
        return [("", _listed(rows, columns))]
    return [(model, _listed(same, columns)) for model, same in _grouped(rows, "model")]


def _gpu_search(rows: list[Content]) -> list[tuple[str, Table]]:
    columns = {
        "model": lambda row: row["model"],
        "beam": lambda row: str(row["beam"]),
        "sentences": lambda row: formatting.count(row["sentences"]),
        "sentences per second": lambda row: f"{row['sentences_per_second']:.1f}",
        "tokens per second": lambda row: formatting.count(row["tokens_per_second"]),
        "time / LN's": lambda row: _ratio(row, "ratio_to_layer"),
    }
    return [("", _listed(rows, columns))]


def _gpu_graphs(rows: list[Content]) -> list[tuple[str, Table]]:
    columns = {
        "norm": lambda row: row["norm"],
        "equal to the bit": lambda row: (
            f"{'yes' if row['equal_to_the_bit'] else 'NO'}, {row['steps']} steps"
        ),
        "eager, µs": lambda row: f"{row['microseconds']['eager']:.0f}",
        "replayed, µs": lambda row: f"{row['microseconds']['replayed']:.0f}",
        "replayed / eager": lambda row: _ratio(row, "ratio_to_eager"),
    }
    return [("", _listed(rows, columns))]


_GPU_TABLES: dict[str, Callable[[list[Content]], list[tuple[str, Table]]]] = {
    "copy": _gpu_copy,
    "kernels": _gpu_kernels,
    "layers": _gpu_layers,
    "translation": _gpu_updates,
    "language_model": _gpu_updates,
    "beam_search": _gpu_search,
    "graphs": _gpu_graphs,
    "compiled": _gpu_layers,
}
TITLES = {
    "norms": "Normalization layers",
    "scaling": "Normalization layers over their size",
    "training": "Training",
    "inference": "Inference",
    "data": "Reading of data",
    "diagnostics": "Diagnostics of training",
    "attention": "Attention of the Tensorized Transformer",
    "ranks": "Statistics of several ranks",
    "preparation": "Preparation of WMT14",
    "gpu": "On a GPU",
}
_TABLES: dict[str, Callable[[Content], list[tuple[str, Table]]]] = {
    "norms": _norms,
    "scaling": _scaling,
    "training": _training,
    "inference": _inference,
    "data": _data,
    "diagnostics": _diagnostics,
    "attention": _attention,
    "ranks": _ranks,
    "preparation": _preparation,
    "gpu": _gpu,
}


def _left_out(skipped: Mapping[str, str]) -> list[Note]:
    return [Note(f"Skipped: {name}: {reason}.") for name, reason in skipped.items()]


def _gigabytes(number: int | None) -> str:
    return "" if number is None else f"{number / 1e9:.2f}"


def _grouped(rows: Iterable[Content], key: str) -> list[tuple[str, list[Content]]]:
    groups: dict[str, list[Content]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return list(groups.items())


def _pivot(rows: list[Content], down: str, across: str, cell: Callable[[Content], str]) -> Table:
    """Make one line per value of `down` and one column per value of `across`."""
    columns = list(dict.fromkeys(row[across] for row in rows))
    lines: list[list[Cell]] = []
    for name, same in _grouped(rows, down):
        shown = {row[across]: _marked(row, cell(row)) for row in same}
        lines.append([name, *(shown.get(column, "") for column in columns)])
    return Table([down, *(f"{column}" for column in columns)], lines, _notes(rows))


def _listed(rows: list[Content], columns: Mapping[str, Callable[[Content], str]]) -> Table:
    """Make one line per row; a disturbed row is marked in its last cell."""
    lines: list[list[Cell]] = []
    for row in rows:
        *first, last = (text(row) for text in columns.values())
        lines.append([*first, _marked(row, last)])
    return Table(list(columns), lines, _notes(rows))


def _notes(rows: list[Content]) -> list[Note]:
    return [_NOT_QUIET] if any(row.get("disturbed") for row in rows) else []


def _marked(row: Content, text: str) -> str:
    return f"{text} {_DISTURBED}" if row.get("disturbed") else text


def _ratio(row: Content, key: str, decimals: int = 2) -> str:
    return _quartiles(row[key], decimals)


def _quartiles(values: list[float], decimals: int = 2) -> str:
    low, median, high = (f"{value:.{decimals}f}" for value in values)
    return median if low == high else f"{median} ({low}–{high})"


def _range(times: list[float]) -> str:
    return "–".join(f"{time:g}" for time in times)


def _times(times: list[float], of: list[float]) -> str:
    """Format the ratio of two ranges: one number, or its minimum and maximum."""
    least, most = min(times) / max(of), max(times) / min(of)
    return f"{least:.1f}" if least == most else f"{least:.1f}–{most:.1f}"
