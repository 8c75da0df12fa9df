"""The binarized stage: fairseq's dictionaries and data files, as fairseq-preprocess makes them.

fairseq's functions are called and not its program, which configures the logging of the whole
process, reads a CR inside a line as a line end, waits forever when one of its processes is killed,
and takes five times as long.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from normexp.corpora.catalogue import Corpus
from normexp.corpora.parallel_text import Row, open_text, read_rows
from normexp.corpora.process_pool import map_rows
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
            rows = tqdm(
                read_rows([source]), f"{corpus.name} {source.name} binary", disable=not progress
            )
            counts = _binarize(rows, dictionary, folder / f"{split}{pair}", workers)
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
    """Turns a line into the bytes of its int32 token numbers, and the number of unknown ones."""

    indices: dict[str, int]
    unknown: int
    unknown_word: str
    end: int

    def __call__(self, row: tuple[str]) -> tuple[bytes, int]:
        words = row[0].split()
        numbers = [self.indices.get(word, self.unknown) for word in words]
        replaced = numbers.count(self.unknown) - words.count(self.unknown_word)
        return np.array([*numbers, self.end], dtype=np.int32).tobytes(), replaced


def _binarize(rows: Iterable[Row], dictionary, prefix: Path, workers: int) -> dict:
    import torch
    from fairseq.data.indexed_dataset import data_file_path, index_file_path, make_builder

    encoder = _Encoder(dictionary.indices, dictionary.unk(), dictionary.unk_word, dictionary.eos())
    builder = make_builder(data_file_path(str(prefix)), "mmap", vocab_size=len(dictionary))
    lengths, unknown = [], 0
    for numbers, replaced in map_rows(encoder, rows, workers):
        # A copy, since PyTorch warns of memory that it must not write to.
        tokens = torch.from_numpy(np.frombuffer(numbers, dtype=np.int32).copy())
        builder.add_item(tokens)
        lengths.append(len(tokens))
        unknown += replaced
    builder.finalize(index_file_path(str(prefix)))
    lengths = np.array(lengths, dtype="<i4")
    return {
        "sentences": len(lengths),
        "tokens": int(lengths.sum()),
        "unknown": unknown,
        "longest": int(lengths.max()),
        "lengths_sha256": hashlib.sha256(lengths.tobytes()).hexdigest(),
    }
