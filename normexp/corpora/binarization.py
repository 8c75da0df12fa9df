"""The binarized stage, made by the parts fairseq-preprocess itself is made of.

They are called directly rather than through `fairseq_cli.preprocess` because importing that
module configures the logging of the whole process.
"""

import hashlib
from pathlib import Path

from normexp.corpora.catalogue import SPLITS, Corpus
from normexp.corpora.text import final_text
from normexp.errors import UserError

# Below this size, starting processes takes longer than reading the file.
_SMALL_FILE = 32 << 20


def build_binary(corpus: Corpus, text: Path, folder: Path, workers: int) -> dict:
    """Make fairseq's data folder from the text stage.

    The same files as ``fairseq-preprocess --joined-dictionary`` (where the recipe says so) or
    ``--only-source`` with its defaults: mmap files, no frequency threshold, the dictionary padded
    to a multiple of 8. Returns dictionary sizes and, per split, the number of sentences and per
    language tokens (with one end-of-sentence each) and the hash of the sentence lengths.

    Raises UserError if fairseq finds other line ends than the text stage wrote.
    """
    # Importing fairseq registers its configurations with Hydra, so not before it is needed.
    from fairseq.tasks.fairseq_task import FairseqTask

    dictionaries = {}
    for language in corpus.languages:
        if corpus.joined_dictionary and dictionaries:
            dictionaries[language] = dictionaries[corpus.languages[0]]
            continue
        trained_on = corpus.languages if corpus.joined_dictionary else [language]
        files = [final_text(corpus, "train", name, text) for name in trained_on]
        dictionaries[language] = FairseqTask.build_dictionary(
            list(map(str, files)), min(_workers(file, workers) for file in files), padding_factor=8
        )
    splits = {}
    for language, dictionary in dictionaries.items():
        suffix = f".{language}" if corpus.is_parallel else ""
        dictionary.save(str(folder / f"dict{suffix}.txt"))
        pair = f".{'-'.join(corpus.languages)}{suffix}" if suffix else ""
        for split in SPLITS:
            counts = _binarize(
                final_text(corpus, split, language, text), dictionary, folder / f"{split}{pair}",
                workers,
            )  # fmt: skip
            record = splits.setdefault(split, {"tokens": {}, "unknown": {}, "lengths_sha256": {}})
            record["sentences"] = counts.pop("sentences")
            for quantity, value in counts.items():
                record[quantity][language] = value
    types = {language: len(dictionary) for language, dictionary in dictionaries.items()}
    return {"dictionary_types": types, "splits": splits}


def _workers(source: Path, workers: int) -> int:
    return workers if source.stat().st_size > _SMALL_FILE else 1


def _binarize(source: Path, dictionary, prefix: Path, workers: int) -> dict:
    from fairseq.binarizer import FileBinarizer, VocabularyDatasetBinarizer
    from fairseq.data.indexed_dataset import MMapIndexedDataset

    summary = FileBinarizer.multiprocess_dataset(
        str(source),
        "mmap",
        VocabularyDatasetBinarizer(dictionary, append_eos=True),
        str(prefix),
        vocab_size=len(dictionary),
        num_workers=_workers(source, workers),
    )
    dataset = MMapIndexedDataset(str(prefix))
    lengths = dataset.sizes.astype("<i4")  # a copy: the view dies with the dataset's memory map
    with source.open("rb") as file:
        sentences = sum(1 for _ in file)
    if len(lengths) != sentences:
        # fairseq reads with universal newlines: a CR inside a line would end it there.
        raise UserError(
            f"{source} has {sentences} lines, fairseq made {len(lengths)} sentences of them; "
            "the text holds carriage returns, remove them with a step of the recipe"
        )
    return {
        "sentences": sentences,
        "tokens": int(lengths.sum()),
        "unknown": summary.num_replaced,
        "lengths_sha256": hashlib.sha256(lengths.tobytes()).hexdigest(),
    }
