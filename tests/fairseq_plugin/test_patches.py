"""fairseq's own training loop hands its metrics to the sinks, and to nothing else."""

import json
import math
import shlex
import subprocess
import sys

import pytest
from fairseq.logging import progress_bar
from fairseq.logging.meters import AverageMeter

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


def test_the_original_is_restored_after_an_error():
    original = progress_bar.WandBProgressBarWrapper
    with pytest.raises(RuntimeError), metrics_sent_to(Recorder()):
        raise RuntimeError
    assert progress_bar.WandBProgressBarWrapper is original


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
