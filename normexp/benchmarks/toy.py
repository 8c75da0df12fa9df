"""Toy corpora, models and tasks of the project's configs, for benchmarks to compute with."""

from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from normexp.config.fairseq_config import trainer_config, typed_config
from normexp.config.settings import parse
from normexp.corpora import prepare
from normexp.paths import CONFIGS


def toy_task(task: str, folder: Path, *overrides: str) -> tuple[DictConfig, Any]:
    """fairseq's configuration of a toy task, with overrides of ours, and fairseq's task.

    The corpus is prepared below `folder`, in 10 s, unless it is there already. On the CPU where
    there is no GPU.
    """
    from fairseq import tasks

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        settings = parse(compose("train", [f"task={task}", *overrides]))
    corpus = prepare(settings.task.corpus, folder, None)
    languages = None
    if corpus.kind == "translation":
        languages = corpus.source_language, corpus.target_language
    fairseq_cfg = trainer_config(typed_config(settings), corpus.data_bin, languages, folder)
    return fairseq_cfg, tasks.setup_task(fairseq_cfg.task)
