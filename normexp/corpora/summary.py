"""A prepared corpus as a table on the terminal."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from normexp.corpora.catalogue import Corpus
from normexp.corpora.expected_counts import Comparison, compare, explain, first_differences
from normexp.corpora.prepared import PreparedCorpus


def print_summary(corpus: Corpus, prepared: PreparedCorpus, console: Console) -> None:
    """Print what was obtained, what the catalogue expects, and what differs first.

    The further test sets that were prepared have tables of their own.
    """
    comparisons = compare(corpus, prepared.manifest, prepared.directory)
    first = first_differences(corpus, comparisons)
    expected = {comparison.quantity: comparison for comparison in comparisons}
    obtained = dict(_counts(prepared)) | {name: c.obtained for name, c in expected.items()}
    # Names are folded where a terminal is narrow, never cut.
    table = Table(title=f"{corpus.name} in {prepared.data_bin}", title_justify="left")
    table.add_column("quantity", overflow="fold")
    for name in ("obtained", "expected"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("")
    for quantity, value in obtained.items():
        comparison = expected.get(quantity)
        table.add_row(
            quantity.removeprefix("splits."),
            _shown(value),
            _shown(comparison.expected) if comparison else "",
            _verdict(comparison, first),
        )
    console.print(table)
    for line in explain(corpus, comparisons):
        console.print(line, markup=False, soft_wrap=True)
    for name, test_set in prepared.test_sets.items():
        print_summary(corpus.alone(name), test_set, console)


def _verdict(comparison: Comparison | None, first: list[Comparison]) -> str:
    if comparison is None:
        return ""
    if comparison.agrees:
        return "ok"
    return "differs" if comparison in first else "follows"


def _counts(prepared: PreparedCorpus) -> Iterator[tuple[str, int]]:
    for split, record in prepared.manifest["splits"].items():
        for quantity in ("raw_sentences", "sentences"):
            if record[quantity] is not None:
                yield f"splits.{split}.{quantity}", record[quantity]
        for quantity in ("words", "tokens", "unknown"):
            for language, value in record[quantity].items():
                yield f"splits.{split}.{quantity}.{language}", value
    for language, value in prepared.manifest["dictionary_types"].items():
        yield f"dictionary_types.{language}", value


def _shown(value: int | str | None) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    algorithm, _, digest = str(value).rpartition(":")
    return f"{algorithm} {digest[:8]}…".strip() if len(digest) > 20 else str(value)
