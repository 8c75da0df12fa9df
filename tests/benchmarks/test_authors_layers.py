"""The authors' layers are loaded from a user's clone; stand-ins of the same interface here."""

from pathlib import Path

import pytest
import torch

from normexp.benchmarks.authors_layers import authors_layers
from normexp.errors import UserError

# Of what the benchmark uses: names of files and classes, arguments, order of dimensions.
LAYER = """
import torch
from torch import nn

class {name}(nn.Module):
    def __init__(self, num_features{options}):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.options = {given}

    def forward(self, input, pad_mask=None, is_encoder=False):
        kept = input.masked_fill(pad_mask.t().unsqueeze(-1), 0.0)
        return kept * self.weight
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "fairseq" / "modules" / "norms"
    folder.mkdir(parents=True)
    # Importing the package around the layers would need an old fairseq.
    (folder.parent / "__init__.py").write_text("raise ImportError('the fairseq of 2019')")
    power = LAYER.format(
        name="MaskPowerNorm",
        options=", warmup_iters=10000, group_num=1",
        given="warmup_iters, group_num",
    )
    (folder / "mask_powernorm.py").write_text(power)
    batch = LAYER.format(name="MaskSyncBatchNorm", options="", given="()")
    (folder / "mask_syncbatchnorm.py").write_text(batch)
    return tmp_path


def test_layers_are_built_as_the_authors_do(clone: Path) -> None:
    layers = authors_layers(clone)
    assert set(layers) == {"power", "batch"}
    assert layers["power"](8).options == (1, 4)  # warm-up, groups
    x, mask = torch.ones(3, 2, 8), torch.tensor([[False, False, True], [False, True, True]])
    for build in layers.values():
        y = build(8)(x, mask)
        assert y.sum((0, 2)).tolist() == [16, 8]


def test_a_folder_without_them_is_named(tmp_path: Path) -> None:
    missing = r"mask_powernorm\.py is missing; give the folder of a clone of .*powernorm"
    with pytest.raises(UserError, match=missing):
        authors_layers(tmp_path / "nowhere")


def test_code_that_does_not_run_is_named_with_its_error(clone: Path) -> None:
    path = clone / "fairseq" / "modules" / "norms" / "mask_syncbatchnorm.py"
    path.write_text("from torch import what_there_was_once")
    with pytest.raises(UserError, match=r"mask_syncbatchnorm\.py does not run: ImportError"):
        authors_layers(clone)
    path.write_text("")
    with pytest.raises(UserError, match=r"mask_syncbatchnorm\.py does not run: AttributeError"):
        authors_layers(clone)
