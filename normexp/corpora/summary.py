"""A prepared corpus as a table on the terminal."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from normexp.corpora.catalogue import Corpus
from normexp.corpora.expected_counts import compare
from normexp.corpora.prepared import PreparedCorpus


def print_summary(corpus: Corpus, prepared: PreparedCorpus, console: Console) -> None:
    """Print what was obtained, what the catalogue expects, and why they differ if that is known."""
    comparisons = compare(corpus, prepared.manifest, prepared.directory)
    expected = {comparison.quantity: comparison for comparison in comparisons}
    obtained = dict(_counts(prepared)) | {name: c.obtained for name, c in expected.items()}
    table = Table("quantity", title=f"{corpus.name} in {prepared.data_bin}", title_justify="left")
    table.add_column("obtained", justify="right")
    table.add_column("expected", justify="right")
    table.add_column("")
    for quantity, value in obtained.items():
        comparison = expected.get(quantity)
        table.add_row(
            quantity.removeprefix("splits."),
            _shown(value),
            _shown(comparison.expected) if comparison else "",
            "" if not comparison else "ok" if comparison.agrees else "differs",
        )
    console.print(table)
    for comparison in comparisons:
        if not comparison.agrees:
            cause = comparison.cause or "cause not known"
            console.print(f"{comparison.quantity.removeprefix('splits.')} differs: {cause}")


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
