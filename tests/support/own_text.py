"""Made-up text of users' own corpora: Czech and French sentences, all different."""

from itertools import product
from pathlib import Path

WHO = {"Mám": "J' ai", "Máš": "Tu as", "Máme": "Nous avons", "Mají": "Ils ont"}
NUMBER = {"dva": "deux", "tři": "trois", "čtyři": "quatre", "pět": "cinq", "šest": "six"}
THING = {"knihy": "livres", "stoly": "tables", "domy": "maisons", "stromy": "arbres"}
WHERE = {"doma": "à la maison", "venku": "dehors", "zítra": "demain", "tam": "là-bas"}

# Words and marks are separated by blanks: tokenizing changes nothing but the apostrophe's name.
PAIRS = [
    tuple(" ".join([*words, "."]) for words in zip(*choice, strict=True))
    for choice in product(WHO.items(), NUMBER.items(), THING.items(), WHERE.items())
]


def write(path: Path, lines: list[str]) -> Path:
    """A text file with these lines."""
    path.write_bytes("".join(line + "\n" for line in lines).encode())
    return path


def sides(pairs: list[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """The Czech and the French lines."""
    czech, french = zip(*pairs, strict=True)
    return list(czech), list(french)


def parallel(folder: Path, pairs: list[tuple[str, str]] = PAIRS) -> list[Path]:
    """corpus.cs and corpus.fr."""
    czech, french = sides(pairs)
    return [write(folder / "corpus.cs", czech), write(folder / "corpus.fr", french)]
