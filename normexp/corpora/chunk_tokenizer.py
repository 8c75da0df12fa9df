"""Tokenizing many lines fast: what stands between two blanks is tokenized only once.

Most rules of tokenizer.perl look at neighbouring characters of a chunk, the text between two
blanks. Those that look further are listed at `ChunkTokenizer._keys_of`. With them told apart, what
becomes of a chunk does not depend on its line, and since most chunks are frequent, a dictionary
replaces the rules. New chunks are tokenized by the rules, all of a block of lines at once.
"""

import string
from collections.abc import Callable, Sequence
from itertools import chain, pairwise

MAX_CHUNKS = 200_000  # of a dictionary, which is emptied then; frequent chunks soon return
# Apart from what they do with these five and with letters and digits, the rules put blanks around
# every character. Around these of ASCII that is done first, so that there are fewer chunks.
_PADDED = "".join(sorted(set(string.punctuation) - set(".'`,-")))
# The rules write it for dots and make dots of it.
_MARKER = "DOTMULTI"
# Stands between chunks: a character around which the rules put blanks, too.
_SEPARATOR = "\ue000"
# Deleted by the rules. The control characters between are blanks.
_DELETED = dict.fromkeys([*range(0x09), *range(0x0E, 0x20)])
_LOWER, _DIGIT, _OTHER = " a", " 0", " A"


class ChunkTokenizer:
    """Tokenizes lines as a function that follows Moses's rules does with each of them.

    tokenize: that function. is_lower: whether a character is a lowercase letter to the rules.
    kept: those of the padded characters around which the rules do not always put blanks.
    """

    def __init__(
        self, tokenize: Callable[[str], str], is_lower: Callable[[str], bool], kept: str = ""
    ) -> None:
        self._tokenize = tokenize
        self._is_lower = is_lower
        self._padded = [character for character in _PADDED if character not in kept]
        self._tokens: dict[str, str] = {}  # what letters alone, which stay as they are, are not in

    def __call__(self, lines: Sequence[str]) -> list[str]:
        """The tokens of each line, none of which has a line end in it."""
        if not lines:
            return []
        text = "\n".join(lines).replace(", ", " , ")
        for character in self._padded:
            text = text.replace(character, f" {character} ")
        rows = list(map(self._keys_of, text.split("\n")))
        self._learn({key for key in set(chain.from_iterable(rows)) if not key.isalpha()})
        tokens_of = self._tokens.get
        return [
            " ".join(map(tokens_of, keys, keys)) if keys else self._tokenize(line)
            for line, keys in zip(lines, rows, strict=True)
        ]

    def _keys_of(self, line: str) -> Sequence[str]:
        """The dictionary's keys for the chunks of a line; none if it is to be tokenized whole.

        A key is a chunk, with a token behind it where that matters: a dot that ends a chunk stays
        there or not, depending on whether the next chunk begins with a lowercase letter or a
        digit. The dot that ends a line never stays and is a chunk of its own here.

        Tokenized whole are blank lines; those that begin with an apostrophe or comma or end with
        an apostrophe, since rules want a neighbour there; those in which a blank is the neighbour
        of two apostrophes, since a rule that has taken it for one does not see the other; and
        those with the rules' own marker in them.
        """
        if not line.isprintable():
            line = line.translate(_DELETED)
            if _SEPARATOR in line:
                return ()
        keys = line.split()
        if not keys or _MARKER in line:
            return ()
        last = keys[-1]
        if keys[0][0] in "'," or last[-1] == "'":
            return ()
        if "'" in line and any(a[-1] == "'" == b[0] for a, b in pairwise(keys)):
            return ()
        if line.count(".") > last.count("."):
            for number, (chunk, following) in enumerate(pairwise(keys)):
                if _ends_in_one_dot(chunk):
                    keys[number] += self._kind(following[0])
        if _ends_in_one_dot(last):
            keys[-1:] = last[:-1], "."
        return keys

    def _kind(self, character: str) -> str:
        if self._is_lower(character):
            return _LOWER
        return _DIGIT if character in string.digits else _OTHER

    def _learn(self, keys: set[str]) -> None:
        """Put the tokens of `keys` into the dictionary."""
        if len(self._tokens) + len(keys) > MAX_CHUNKS:
            self._tokens.clear()
        new = list(keys.difference(self._tokens))
        if not new:
            return
        between = f" {_SEPARATOR} "
        # With a word at either end, so that every chunk has neighbours.
        _, *tokenized, _ = self._tokenize(between.join(["a", *new, "a"])).split(between)
        for key, tokens in zip(new, tokenized, strict=True):
            self._tokens[key] = tokens[: -len(_OTHER)] if " " in key else tokens


def _ends_in_one_dot(chunk: str) -> bool:
    return chunk[-1] == "." and len(chunk) > 1 and chunk[-2] != "."
