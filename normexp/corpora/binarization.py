"""The binarized stage: fairseq's dictionaries and data files, as fairseq-preprocess makes them.

fairseq's functions are called and not its program, which configures the logging of the whole
process, reads a CR inside a line as a line end, waits forever when one of its processes is killed,
and takes five times as long.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path

import numpy as np

from normexp.corpora.catalogue import Corpus
from normexp.corpora.parallel_text import Block, columns_of, open_text, read_blocks
from normexp.corpora.process_pool import map_blocks
from normexp.corpora.text import final_text


def build_binary(
    corpus: Corpus,
    text: Path,
    folder: Path,
    workers: int,
    progress: bool,
    trained: Path | None = None,
) -> dict:
    """Make fairseq's data folder from the text stage, and return its counts.

    The files are those of ``fairseq-preprocess --joined-dictionary`` (where the recipe says so) or
    ``--only-source`` with its defaults: mmap files, no frequency threshold, the dictionary padded
    to a multiple of 8. The counts are dictionary sizes and, per split, the number of sentences and
    per language tokens (with one end-of-sentence each), unknown tokens, tokens of the longest
    sentence, and the hash of the sentence lengths.

    trained: a data folder whose dictionaries are taken instead of those of the train split.
    """
    dictionaries = {}
    for language in corpus.languages:
        if trained is not None:
            dictionaries[language] = _load_dictionary(trained / _dictionary_name(corpus, language))
            continue
        if corpus.joined_dictionary and dictionaries:
            dictionaries[language] = dictionaries[corpus.languages[0]]
            continue
        trained_on = corpus.languages if corpus.joined_dictionary else [language]
        files = [final_text(corpus, "train", name, text) for name in trained_on]
        dictionaries[language] = _dictionary(files)
    splits = {}
    for language, dictionary in dictionaries.items():
        suffix = f".{language}" if corpus.is_parallel else ""
        dictionary.save(str(folder / _dictionary_name(corpus, language)))
        pair = f".{'-'.join(corpus.languages)}{suffix}" if suffix else ""
        for split in corpus.splits:
            source = final_text(corpus, split, language, text)
            blocks = read_blocks([source], f"{corpus.name} {source.name} binary", progress)
            counts = _binarize(blocks, dictionary, folder / f"{split}{pair}", workers)
            record = splits.setdefault(split, {"sentences": counts.pop("sentences")})
            for quantity, value in counts.items():
                record.setdefault(quantity, {})[language] = value
    types = {language: len(dictionary) for language, dictionary in dictionaries.items()}
    return {"dictionary_types": types, "splits": splits}


def _dictionary_name(corpus: Corpus, language: str) -> str:
    return f"dict.{language}.txt" if corpus.is_parallel else "dict.txt"


def _load_dictionary(file: Path):
    from fairseq.data import Dictionary

    return Dictionary.load(str(file))


def _dictionary(files: list[Path]):
    """fairseq's dictionary of all words of the files."""
    # Importing fairseq registers its configurations with Hydra, so not before it is needed.
    from fairseq.data import Dictionary

    counts: Counter[str] = Counter()
    for file in files:
        with open_text(file) as lines:
            counts.update(chain.from_iterable(line.split() for line in lines))
    dictionary = Dictionary()
    for word, count in sorted(counts.items()):
        dictionary.add_symbol(word, count)
    dictionary.finalize(padding_factor=8)
    return dictionary


@dataclass(frozen=True)
class _Encoder:
    """Turns the lines of a block into numbers.

    Returns the bytes of all token numbers, the number of tokens of each line, both with an end of
    sentence, and how many words are unknown.
    """

    indices: dict[str, int]
    unknown: int
    unknown_word: str
    end: int
    dtype: type

    def __call__(self, block: Block) -> tuple[bytes, list[int], int]:
        (lines,) = columns_of(block)
        rows = [line.split() for line in lines]
        lengths = [len(words) + 1 for words in rows]
        numbers: list[int] = []
        replaced = 0
        for words in rows:
            numbers += map(self.indices.get, words, repeat(self.unknown))
            numbers.append(self.end)
            replaced -= words.count(self.unknown_word)
        replaced += numbers.count(self.unknown)
        return np.array(numbers, dtype=self.dtype).tobytes(), lengths, replaced


def _binarize(blocks: Iterable[Block], dictionary, prefix: Path, workers: int) -> dict:
    from fairseq.data.indexed_dataset import (
        MMapIndexedDataset,
        best_fitting_int_dtype,
        data_file_path,
        index_file_path,
    )

    dtype = best_fitting_int_dtype(len(dictionary))
    encoder = _Encoder(
        dictionary.indices, dictionary.unk(), dictionary.unk_word, dictionary.eos(), dtype
    )
    sizes, unknown = [], 0
    with open(data_file_path(str(prefix)), "wb") as data:
        for numbers, lengths, replaced in map_blocks(encoder, blocks, workers):
            data.write(numbers)
            sizes += lengths
            unknown += replaced
    with MMapIndexedDataset.Index.writer(index_file_path(str(prefix)), dtype) as index:
        index.write(sizes)
    lengths = np.array(sizes, dtype="<i4")
    return {
        "sentences": len(lengths),
        "tokens": int(lengths.sum()),
        "unknown": unknown,
        "longest": int(lengths.max()),
        "lengths_sha256": hashlib.sha256(lengths.tobytes()).hexdigest(),
    }
