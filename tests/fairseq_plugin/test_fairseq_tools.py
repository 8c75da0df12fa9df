"""The stock command-line tools with --user-dir, each in its own process."""

import logging
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from hydra.version import VersionBase
from packaging.version import Version
from support.forked_processes import run

PLUGIN = Path(__file__).resolve().parents[2] / "normexp" / "fairseq_plugin"
TRAINING = (
    "--optimizer adam --lr 0.003 --max-update 12 --max-tokens 200 --cpu --num-workers 0 "
    '--no-epoch-checkpoints --norm power --norm-options {"warmup_steps":4} --seed 1'
)


def _run(command: list[str], folder: Path, python_path: str = "") -> str:
    """Run in a foreign folder, without variables of the environment; return what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr + done.stdout


def _arguments(name: str, data: Path, flags: str) -> list[str]:
    return [f"fairseq-{name}", str(data), "--user-dir", str(PLUGIN), *flags.split()]


def _tool(name: str, data: Path, flags: str, folder: Path) -> str:
    """A tool as users start it."""
    program, *arguments = _arguments(name, data, flags)
    return _run([str(Path(sys.executable).parent / program), *arguments], folder)


def _forked_tool(name: str, data: Path, flags: str, folder: Path) -> str:
    """A tool in a process that is forked from this one, which takes no time to begin."""

    def work() -> None:
        os.chdir(folder)
        sys.argv = _arguments(name, data, flags)
        VersionBase.instance().version_base = Version("1.1")  # which another test may have changed
        logging.basicConfig(stream=sys.stdout, level=logging.INFO)
        import_module(f"fairseq_cli.{name}").cli_main()

    done = run(work)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr + done.stdout


def test_translation_with_train_resume_and_generate(tmp_path: Path, translation_data: Path) -> None:
    flags = (
        f"--arch normexp_translation_tiny --encoder-layers 1 {TRAINING} "
        "--criterion label_smoothed_cross_entropy --save-dir checkpoints --eval-bleu "
        '--eval-bleu-args {"beam":1,"max_len_a":0,"max_len_b":5}'
    )
    log = _tool("train", translation_data, flags, tmp_path)
    assert "PowerNorm(128" in log and "warmup_steps=4" in log
    assert re.search(r"valid on 'valid' subset \| loss \d.*\| bleu [\d.]+.*num_updates 12", log)

    resumed = flags.replace("update 12", "update 15")
    log = _forked_tool("train", translation_data, resumed, tmp_path)
    assert "Loaded checkpoint checkpoints/checkpoint_last.pt (epoch" in log
    assert re.search(r"num_updates 15\b", log)

    output = _forked_tool(
        "generate",
        translation_data,
        "--path checkpoints/checkpoint_last.pt --beam 2 --cpu --max-len-a 0 --max-len-b 9",
        tmp_path,
    )
    # All of them, although fairseq's default leaves out those after the last multiple of 8.
    assert sorted(re.findall(r"^H-(\d+)", output, re.M), key=int) == [str(i) for i in range(13)]
    assert "Generate test with beam=2: BLEU4 = " in output

    losses = [
        re.search(r"valid on 'test' subset \| loss ([\d.]+) \| nll_loss ([\d.]+)", log).groups()
        for multiple in (8, 1)
        for log in [
            _forked_tool(
                "validate",
                translation_data,
                "--task translation --path checkpoints/checkpoint_last.pt --valid-subset test "
                f"--cpu --max-tokens 200 --required-batch-size-multiple {multiple}",
                tmp_path,
            )
        ]
    ]
    assert losses[0] == losses[1]


def test_language_model_with_train_and_eval_lm(tmp_path: Path, language_model_data: Path) -> None:
    flags = (
        f"--task language_modeling --arch normexp_lm_tiny {TRAINING} --tokens-per-sample 16 "
        "--criterion cross_entropy --save-dir checkpoints"
    )
    log = _forked_tool("train", language_model_data, flags, tmp_path)
    assert log.count("PowerNorm(128") == 3  # in the layers, which are printed once, and final

    output = _tool(
        "eval-lm",
        language_model_data,
        "--path checkpoints/checkpoint_last.pt --tokens-per-sample 16 --cpu",
        tmp_path,
    )
    tokens = int(re.search(r"Evaluated ([\d,]+) tokens", output)[1].replace(",", ""))
    text = (language_model_data.parent / "test.txt").read_text(encoding="utf-8")
    assert tokens == len(text.split()) + text.count("\n")  # every word and sentence end
    # 20 words drawn uniformly and an end every 7 tokens or so: below that nothing can be learned.
    assert 10 < float(re.search(r"Perplexity: ([\d.]+)", output)[1]) < 40


ALIAS_AND_CANONICAL = """
import argparse, sys
from fairseq import models, utils
for step in sys.argv[2:]:
    if step == "import":
        import normexp.fairseq_plugin
    else:
        utils.import_user_module(argparse.Namespace(user_dir=sys.argv[1]))
        utils.import_user_module.memo.clear()  # as if another caller asked for it
model = models.MODEL_REGISTRY["normexp_transformer"]
print(model.__module__, sys.modules[model.__module__].__file__)
print(sorted(name for name in sys.modules if name.startswith("fairseq_plugin.")))
print("normexp_iwslt_small" in models.ARCH_MODEL_REGISTRY)
print([path for path in sys.path if path.endswith("normexp")])
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of the plugin's part of the repository in another folder."""
    for part in ("normexp", "configs/model"):
        source = PLUGIN.parents[1] / part
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, tmp_path / "clone" / part, ignore=ignore)
    return tmp_path / "clone" / "normexp" / "fairseq_plugin"


def _check_registered_once(lines: list[str], plugin: Path) -> None:
    assert lines == [
        f"normexp.fairseq_plugin.transformer {plugin / 'transformer.py'}",
        "[]",  # nothing was imported a second time under fairseq's name for the folder
        "True",
        "[]",
    ]


def test_models_are_registered_once_if_python_imports_first(tmp_path: Path) -> None:
    steps = ["import", "user-dir", "user-dir"]
    command = [sys.executable, "-c", ALIAS_AND_CANONICAL, str(PLUGIN), *steps]
    output = _run(command, tmp_path, python_path=str(PLUGIN.parents[1]))
    _check_registered_once(output.splitlines()[-4:], PLUGIN)


def test_models_of_an_uninstalled_clone_are_registered_once(clone: Path, tmp_path: Path) -> None:
    presets = clone.parents[1] / "configs" / "model"
    (presets / "of_the_clone.yaml").write_text("_name: normexp_transformer\n", encoding="utf-8")
    code = ALIAS_AND_CANONICAL + "print('normexp_of_the_clone' in models.ARCH_MODEL_REGISTRY)"
    steps = ["user-dir", "user-dir", "import"]
    lines = _run([sys.executable, "-c", code, str(clone), *steps], tmp_path).splitlines()
    _check_registered_once(lines[-5:-1], clone)
    assert lines[-1] == "True"


def test_two_copies_in_one_process_are_refused(clone: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", ALIAS_AND_CANONICAL, str(clone), "import", "user-dir"]
    with pytest.raises(AssertionError, match=r"already imported from .*; use that folder"):
        _run(command, tmp_path, python_path=str(PLUGIN.parents[1]))
