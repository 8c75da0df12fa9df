"""Whole runs on the toy corpora with models small enough to train in a second or two."""

import os
import subprocess
import sys
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from normexp.config.departures import settings_of
from normexp.config.settings import RunSettings
from normexp.corpora.catalogue import CATALOGUE

REPOSITORY = Path(__file__).resolve().parents[2]

# A label of its own, so that the settings below are not added to it: LN, PN, as without them.
LABEL = "label=${oc.select:norm.label}"
SMALL = {
    "toy_translation": [
        LABEL,
        "fairseq.model.encoder.embed_dim=16",
        "fairseq.model.encoder.ffn_embed_dim=16",
        "fairseq.model.encoder.layers=1",
        "fairseq.model.decoder.embed_dim=16",
        "fairseq.model.decoder.ffn_embed_dim=16",
        "fairseq.model.decoder.layers=1",
        "fairseq.dataset.max_tokens=16000",
        "evaluation.beam=1",
        "evaluation.max_tokens=16000",
    ],
    "toy_language_model": [
        LABEL,
        "fairseq.model.decoder_embed_dim=16",
        "fairseq.model.decoder_ffn_embed_dim=16",
        "fairseq.model.decoder_layers=1",
        "fairseq.dataset.max_tokens=16000",
        "evaluation.max_tokens=16000",
    ],
}


def few_sentences(folder: Path) -> Path:
    """A catalogue of the toy corpora with so little text that an epoch takes a moment."""
    known = yaml.safe_load(CATALOGUE.read_text())["corpora"]
    toys = {name: known[name] for name in ("toy_translation", "toy_language_model")}
    for toy in toys.values():
        toy["sizes"] = {"train": 200, "valid": 20, "test": 12}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "catalogue.yaml"
    path.write_text(yaml.safe_dump({"corpora": toys}))
    return path


def composed(*overrides: str) -> RunSettings:
    """The settings that scripts/train.py parses from the primary config and overrides."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(REPOSITORY / "configs"), version_base="1.3"):
        cfg = compose("train", list(overrides), return_hydra_config=True)
        return settings_of(cfg, cfg.hydra.runtime.choices)


def run_script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a script of the project in a fork of this process, in which little text stays little."""
    from support import forked_processes  # here, because torch takes seconds

    return forked_processes.run(forked_processes.script(name, *arguments), **environment)


def train_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run scripts/train.py in a fork of this process."""
    return run_script("train.py", *arguments, **environment)


def script_process(
    name: str, *arguments: str, catalogue: Path | None = None, **environment: str
) -> subprocess.CompletedProcess:
    """Run a script of the project as a user does, in a process of its own, which takes seconds.

    catalogue: of corpora, in place of the project's.
    """
    return subprocess.run(
        [sys.executable, *script_command(name, catalogue), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=REPOSITORY,
    )


def script_command(name: str, catalogue: Path | None = None) -> list[str]:
    """What Python is to run for a script, maybe with another catalogue of corpora."""
    script = str(REPOSITORY / "scripts" / name)
    if catalogue is None:
        return [script]
    return [str(REPOSITORY / "tests/support/with_catalogue.py"), str(catalogue), script]
