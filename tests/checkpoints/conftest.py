"""The recorded checkpoints, imported once, and their sentences, binarized once."""

import re
from pathlib import Path

import pytest
from fairseq import options
from fairseq_cli import preprocess
from support.authors_format import GOLDEN, RECORDED

from normexp.checkpoints.released import import_checkpoint


@pytest.fixture(scope="session")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name of each recorded checkpoint -> the imported file."""
    folder = tmp_path_factory.mktemp("imported")
    paths = {name: folder / f"{name}.pt" for name in RECORDED}
    for name, path in paths.items():
        import_checkpoint(GOLDEN / f"{name}.pt", path)
    return paths


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded test sentences in their order, de -> en, as test, training and valid split."""
    folder = tmp_path_factory.mktemp("data")
    recorded = (GOLDEN / f"{RECORDED[0]}.gen.txt").read_text(encoding="utf-8")
    for letter, language in (("S", "de"), ("T", "en")):
        lines = dict(re.findall(rf"^{letter}-(\d+)\t(.*)$", recorded, re.M))
        text = "".join(lines[number] + "\n" for number in sorted(lines, key=int))
        (folder / f"text.{language}").write_text(text, encoding="utf-8")
    flags = ["-s", "de", "-t", "en", "--destdir", str(folder / "bin"), "--workers", "1"]
    for flag in ("--trainpref", "--validpref", "--testpref"):
        flags += [flag, str(folder / "text")]
    for flag in ("--srcdict", "--tgtdict"):
        flags += [flag, str(GOLDEN / "dict.de.txt")]
    preprocess.main(options.get_preprocessing_parser().parse_args(flags))
    return folder / "bin"
