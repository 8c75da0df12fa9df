"""The block of docs/replacing_norms.md runs as it stands, and padding does not count in it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from normexp.norms import padding_mask_for

GUIDE = Path(__file__).parents[2] / "docs" / "replacing_norms.md"


def test_the_convolution_module(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text("utf-8"), re.M | re.S)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(block, GUIDE.name, "exec"), names)
    assert capsys.readouterr().out == "['0.batch_norm', '1.batch_norm']\n"
    model, x, mask = names["model"], names["x"], torch.arange(50) >= names["lengths"][:, None]
    norm: nn.Module = model[0].batch_norm
    frames = model[0].before(x.mT).mT[~mask]
    torch.testing.assert_close(norm.running_mean, 0.1 * frames.mean(0))
    before = norm.running_mean.clone()
    with padding_mask_for(model, padding_mask=mask):
        model.eval()(x)
    assert torch.equal(norm.running_mean, before)
