#!/usr/bin/env python
"""Add a corpus of your own: one command makes the catalogue entry, the data and the task.

    python scripts/add_corpus.py NAME train.cs train.fr --valid dev.cs dev.fr --test test.cs test.fr
    python scripts/add_corpus.py NAME corpus.cs corpus.fr          # valid and test are held out
    python scripts/add_corpus.py NAME novel.txt                    # a language model
    python scripts/add_corpus.py NAME train.tok.cs train.tok.fr --languages cs fr --tokenized
    python scripts/add_corpus.py NAME a.cs a.fr --sentencepiece spm.model
    python scripts/add_corpus.py NAME a.bpe.cs a.bpe.fr --languages cs fr --segmented subword-nmt
    python scripts/add_corpus.py NAME data-bin/                    # fairseq-preprocess's output
    python scripts/add_corpus.py NAME my_dataset/ --columns source target --languages cs fr

then

    python scripts/train.py task=NAME norm=power

SOURCE is one text file (a language model), two aligned ones (translation, source first), one file
with rows (.jsonl, .csv, .parquet), or a folder: fairseq's data, a data set of Hugging Face's
(save_to_disk, or one file for each split), or texts named train.cs, train.fr, valid.cs, ... Texts
are UTF-8, one sentence a line, .gz or not. What is wrong with them is said with the line; then
nothing is added. docs/own_corpus.md explains each kind and how it is scored.

The text is copied to data/own/corpora/NAME, the task is data/own/configs/task/NAME.yaml, both
ignored by git (NORMEXP_OWN_CORPORA=FOLDER puts them elsewhere).
"""

import logging
import sys
from pathlib import Path

from normexp.config.command_grammar import Parser
from normexp.errors import exit_on_user_error


def main() -> None:
    """Parse the command line, add the corpus, say what was done."""
    parser = Parser(description=__doc__)
    parser.add_argument("name", metavar="NAME", help="of the corpus and of its task")
    parser.add_argument("sources", metavar="SOURCE", nargs="+", type=Path, help="see above")
    splits = parser.add_argument_group("splits (default: lines of SOURCE are held out)")
    splits.add_argument("--valid", metavar="FILE", nargs="+", type=Path, default=[])
    splits.add_argument("--test", metavar="FILE", nargs="+", type=Path, default=[])
    text = parser.add_argument_group("what the text is")
    text.add_argument(
        "--languages",
        metavar="CODE",
        nargs="+",
        default=[],
        help="source and target, or the one language (default: the ends of the files' names)",
    )
    text.add_argument(
        "--columns",
        metavar="COLUMN",
        nargs="+",
        default=[],
        help="of rows: the text, or the two sides",
    )
    text.add_argument(
        "--tokenized", action="store_true", help="words are tokens already: no tokenization"
    )
    text.add_argument(
        "--segmented",
        choices=("subword-nmt", "sentencepiece"),
        help="the text is in pieces already: go@@ ing, or \u2581go ing",
    )
    text.add_argument(
        "--drop-empty", action="store_true", help="leave out pairs with an empty side"
    )
    text.add_argument(
        "--max-words",
        metavar="N",
        type=int,
        default=250,
        help="leave longer pairs out of train (default: 250)",
    )
    tokens = parser.add_argument_group("how words become tokens (default: BPE, learned)")
    tokens.add_argument("--bpe-merges", metavar="N", type=int, help="0: none, words are tokens")
    tokens.add_argument("--bpe-codes", metavar="FILE", type=Path, help="codes of subword-nmt")
    tokens.add_argument("--sentencepiece", metavar="FILE", type=Path, help="a model")
    tokens.add_argument(
        "--separate-dictionaries", action="store_true", help="one for each language"
    )
    parser.add_argument(
        "--replace", action="store_true", help="make a corpus anew whose files have changed"
    )
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        type=Path,
        default=Path("data"),
        help="where it is prepared: data.dir of train.py (default: data)",
    )
    arguments = parser.parse_args()

    from normexp.corpora.adding import add_corpus
    from normexp.corpora.own_request import Request

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    options = vars(arguments)
    options["languages"] = [code for codes in arguments.languages for code in codes.split("-")]
    options["segmented"] = arguments.segmented and arguments.segmented.replace("-", "_")
    added = add_corpus(Request(**options))
    print("\n".join(added.lines))
    print(f"  next: python scripts/train.py task={arguments.name} norm=power")


if __name__ == "__main__":
    try:
        with exit_on_user_error():
            main()
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing has changed")
