#!/usr/bin/env python
"""Download, verify and prepare the corpus of a task.

    python scripts/download.py task=multi30k
    python scripts/download.py task=ptb data.local=/media/archives data.dir=/scratch/data

data.dir is the folder of prepared corpora (default: data), data.local a folder that is searched for
the archives before they are downloaded; data/README.md lists the archives. A corpus that is already
prepared is only reported. Prints a table of the counts obtained beside those expected.
"""

import logging
import sys

from normexp.config.command_grammar import Parser
from normexp.errors import UserError, exit_on_user_error
from normexp.paths import CONFIGS, own_folder


def main() -> None:
    """Parse the command line, prepare the corpus, print its table."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    from normexp.config import own_tasks, terminal
    from normexp.config.composition_errors import explained
    from normexp.config.settings import parse
    from normexp.corpora import available_corpora, prepare
    from normexp.corpora.preparation import find_corpus
    from normexp.corpora.summary import print_summary

    folders = (CONFIGS, own_folder() / "configs")
    tasks = sorted(path.stem for folder in folders for path in (folder / "task").glob("*.yaml"))
    corpora = [name for name in available_corpora() if name not in tasks]
    parser = Parser(
        description=__doc__,
        epilog=f"tasks: {', '.join(tasks)}; corpora without a task: {', '.join(corpora)}",
    )
    parser.add_argument("task", metavar="task=NAME", help="a task, or a corpus without one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="data.dir, data.local")
    arguments, unknown = parser.parse_known_args()
    if unknown:
        parser.error(f"no such option: {unknown[0]}; write task=NAME, data.dir=..., data.local=...")
    key, _, name = arguments.task.partition("=")
    if key != "task" or not name:
        parser.error(f"the first argument is task=NAME, not {arguments.task!r}")

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("normexp").setLevel(logging.INFO)
    task = [] if name in corpora else [arguments.task]
    own_tasks.register()
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            settings = parse(compose("train", [*task, *arguments.overrides]))
    except HydraException as error:
        raise UserError(explained(error, sys.argv)) from error
    corpus = prepare(
        name if name in corpora else settings.task.corpus,
        settings.data.dir,
        settings.data.local,
        splits=settings.evaluation.splits,
    )
    print_summary(find_corpus(corpus.name), corpus, terminal.console())


if __name__ == "__main__":
    try:
        with exit_on_user_error():
            main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command resumes after the last finished stage")
