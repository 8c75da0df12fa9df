"""Names of fairseq are replaced for a time, in one file; its metrics go to the sinks alone."""

import ast
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.data import data_utils, iterators
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.logging import progress_bar
from fairseq.logging.meters import AverageMeter
from fairseq.models import transformer_lm
from fairseq_cli import train as fairseq_train

import normexp
from normexp.fairseq_plugin import patches
from normexp.fairseq_plugin.patches import metrics_sent_to


class Recorder(list):
    def __call__(self, tag, step, values):
        self.append((tag, step, dict(values)))


def test_numbers_reach_every_sink_and_the_wrapped_bar_is_intact():
    first, second = Recorder(), Recorder()
    meter = AverageMeter()
    meter.update(2.0, n=3)
    meter.update(8.0)
    with metrics_sent_to(first, second):
        bar = progress_bar.progress_bar(
            [10, 20], log_format="json", log_interval=1, wandb_project="normexp"
        )
        bar.update_config({"never": "seen"})
        assert len(bar) == 2
        assert list(bar) == [10, 20]
        stats = {"loss": 1.5, "bleu": meter, "text": "x", "num_updates": 7, "ppl": math.inf}
        bar.log(stats, tag="train_inner", step=7)
        bar.print({"loss": 2.5, "num_updates": 9}, tag="valid")
    assert first == [
        ("train_inner", 7, {"loss": 1.5, "bleu": 8.0, "ppl": math.inf}),
        ("valid", 9, {"loss": 2.5}),
    ]
    assert second == first


REPLACED = {
    "TransformerDecoder": (lambda: patches.language_model_decoder(object), transformer_lm),
    "batch_by_size": (patches.last_batches_kept, data_utils),
    "Trainer": (lambda: patches.trainer_class(fairseq_train, object), fairseq_train),
    "validate_and_save": (lambda: patches.after_updates(fairseq_train, print), fairseq_train),
    "WandBProgressBarWrapper": (lambda: metrics_sent_to(Recorder()), progress_bar),
    "BackgroundConsumer": (patches.prefetchers_closed, iterators),
    "copy": (lambda: patches.checkpoint_files_by(print, print), PathManager),
    "torch_persistent_save": (lambda: patches.checkpoint_files_by(print, print), checkpoint_utils),
    "load": (lambda: patches.preloaded({}), torch),
    "all_gather_list": (patches.no_pickled_gathering, distributed_utils),
}


@pytest.mark.parametrize("name", REPLACED)
def test_the_original_is_restored_after_an_error(name):
    context, owner = REPLACED[name]
    original = vars(owner)[name]
    with pytest.raises(RuntimeError), context():
        assert vars(owner)[name] is not original
        raise RuntimeError
    assert vars(owner)[name] is original
    assert name in patches.__doc__


def test_a_training_does_not_inherit_from_the_one_before():
    kept = [
        (checkpoint_utils.save_checkpoint, "best"),
        (fairseq_train.should_stop_early, "best"),
        (fairseq_train.should_stop_early, "num_runs"),
        (distributed_utils.get_global_group, "_global_group"),
    ]
    for function, name in kept:
        setattr(function, name, 0)
    for _ in range(2):  # also where there is nothing to forget
        patches.forget_earlier_trainings(fairseq_train)
        assert not any(hasattr(function, name) for function, name in kept)


def test_no_other_file_replaces_a_name_of_fairseq():
    """By `module.name = ...` or setattr(module, ...), where the file has imported the module."""
    package = Path(normexp.__file__).parent
    for path in set(package.rglob("*.py")) - {Path(patches.__file__)}:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        imported = {
            alias.asname or alias.name.split(".")[0]
            for node in nodes
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
            if (getattr(node, "module", None) or alias.name).startswith("fairseq")
        }
        for node in nodes:
            owner = None
            if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
                owner = node.value
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr":
                owner = node.args[0]
            assert getattr(owner, "id", None) not in imported, f"{path}:{node.lineno}"


TRAINING = """
import json, sys
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq_cli import train
from normexp.fairseq_plugin.patches import metrics_sent_to

calls = []
parser = options.get_training_parser()
cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, sys.argv[1:]))
with metrics_sent_to(lambda tag, step, values: calls.append((tag, step, values))):
    train.main(cfg)
json.dump(calls, open("calls.json", "w"))
"""
ARGUMENTS = """
--task dummy_lm --dict-size 20 --dataset-size 32 --tokens-per-sample 8
--arch transformer_lm --decoder-layers 1 --decoder-embed-dim 8 --decoder-ffn-embed-dim 8
--decoder-attention-heads 1 --batch-size 8 --optimizer sgd --lr 0.1 --max-update 4
--log-interval 2 --log-format none --cpu --num-workers 0 --no-save --wandb-project normexp
"""


def test_a_training_run_of_fairseq(tmp_path):
    # In a process of its own: fairseq changes Hydra's state for good.
    command = [sys.executable, "-c", TRAINING, *shlex.split(ARGUMENTS)]
    subprocess.run(command, cwd=tmp_path, check=True)
    calls = json.loads((tmp_path / "calls.json").read_text(encoding="utf-8"))
    assert [(tag, step) for tag, step, _ in calls] == [
        ("train_inner", 2),
        ("train_inner", 4),
        ("valid", 4),
        ("train", 4),
    ]
    for _, _, values in calls:
        assert values["ppl"] == pytest.approx(2 ** values["loss"], rel=1e-2)
        assert "num_updates" not in values
    assert not (tmp_path / "wandb").exists()
