#!/usr/bin/env bash
# fairseq-fixed 0.12.3.1: one validation loss that is not a number makes checkpoint_best.pt forget.
#
# Expected: with validation losses 4, 3, NaN, 5, 4.5 checkpoint_best.pt is that of epoch 2 (3.0).
# Seen: it is that of epoch 5 (4.5). The best value so far is min(loss, best); a NaN replaces it, is
# never "better or equal" itself, and is replaced by whatever comes next, 5.0 here.
# Why it matters: a validation that overflows once, as they do in float16, in the runs of an unstable
# normalization or with an empty subset, is enough: the checkpoint that generate.py is given and that
# the paper's table is computed from is of a later, worse epoch, and the log says "best" for it.
#
# Takes about 5 minutes: fairseq is compiled. Needs Python 3.11 and a C++ compiler.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
pip install "setuptools<81" wheel cython numpy==2.4.6 torch==2.13.0
pip install hydra-core==1.3.2 omegaconf bitarray regex sacrebleu==2.6.0 cffi tqdm scikit-learn packaging
pip install --no-deps --no-build-isolation fairseq-fixed==0.12.3.1
cd "$folder"
"$folder/venv/bin/python" - <<'PY' 2>/dev/null
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

from fairseq.checkpoint_utils import save_checkpoint
from fairseq.dataclass.configs import CheckpointConfig


class Trainer(SimpleNamespace):
    """As much of a trainer as save_checkpoint uses; a checkpoint is the number of its epoch."""

    data_parallel_rank, checkpoint_suffix = 0, ""
    should_save_checkpoint_on_current_rank = True
    always_call_state_dict_during_save_checkpoint = False

    def consolidate_optimizer(self):
        pass

    def get_num_updates(self):
        return 10 * self.epoch

    def save_checkpoint(self, name, extra_state):
        Path(name).write_text(str(self.epoch))
        return name


for epoch, loss in enumerate([4.0, 3.0, float("nan"), 5.0, 4.5], start=1):
    iterator = SimpleNamespace(epoch=epoch, end_of_epoch=lambda: True, state_dict=dict)
    save_checkpoint(CheckpointConfig(save_dir="."), Trainer(epoch=epoch, task=None), iterator, loss)
best = int(Path("checkpoint_best.pt").read_text())
print("fairseq-fixed", version("fairseq-fixed"), "losses 4, 3, NaN, 5, 4.5; checkpoint_best.pt is of epoch", best)
assert best == 5, best
PY
