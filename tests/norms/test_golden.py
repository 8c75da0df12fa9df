"""The `_released` layers against outputs recorded from the authors' code, in float64."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from normexp.norms import build_norm

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
# their option -> ours, and their buffer -> what of ours equals it
OPTIONS = {
    "eps": "eps",
    "momentum": "momentum",
    "alpha_fwd": "alpha_fwd",
    "alpha_bkw": "alpha_bwd",
    "warmup_iters": "warmup_steps",
    "group_num": "num_groups",
}
BUFFERS = {
    "running_phi": "running_psi2",
    "ema_gz": "e",
    "iters": "step",
    "running_mean": "running_mean",
    "running_var": "running_var",
}


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.npz")), ids=lambda path: path.stem)
def test_released_layer_equals_recorded_outputs(path: Path) -> None:
    golden = np.load(path, allow_pickle=False)
    config = json.loads(str(golden["config"]))

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(golden[name])

    options = {ours: config[theirs] for theirs, ours in OPTIONS.items() if theirs in config}
    norm = build_norm(f"{config['kind']}_released", config["num_features"], **options).double()
    norm.load_state_dict({"weight": tensor("weight"), "bias": tensor("bias")}, strict=False)
    checked = 0
    for s in range(config["steps"]):
        x = tensor(f"x{s}").requires_grad_()
        norm.zero_grad()
        y = norm(x, tensor(f"pad{s}").bool())
        y.backward(tensor(f"gy{s}"))
        obtained = {"y": y, "gx": x.grad, "gw": norm.weight.grad, "gb": norm.bias.grad}
        for theirs, ours in BUFFERS.items():
            if f"{theirs}{s}" in golden.files:
                obtained[theirs] = getattr(norm, ours).double().reshape(-1)
        for name, value in obtained.items():
            torch.testing.assert_close(
                value,
                tensor(f"{name}{s}").double(),
                msg=lambda m, n=name, s=s: f"{n}{s}: {m}",
                **TOLERANCE,
            )
            checked += 1
    norm.eval()
    y_eval = norm(tensor("x_eval"), tensor("pad_eval").bool())
    torch.testing.assert_close(y_eval, tensor("y_eval"), **TOLERANCE)
    assert checked == config["steps"] * (7 if config["kind"] == "power" else 6)
