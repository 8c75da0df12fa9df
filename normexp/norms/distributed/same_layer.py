"""Whether the ranks add up the sums of one and the same layer.

A collective knows nothing of layers. Ranks that leave out different ones (LayerDrop draws on each
rank for itself) would pool the statistics of different layers without notice. So the sums carry a
mark of their layer, which shows after the collective whether it was the same on all ranks.

A layer is recognised by its place among the layers that its process has built, counted from the
first or from the last: a rank that has built a further model before or after is in the right.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

NUM_MARKS = 4
_MODULUS = 61  # sums of squares over 4096 ranks are exact in float32

_built = itertools.count()
_num_built = 0


def next_place() -> int:
    """The place of a layer that is being built."""
    global _num_built
    place = next(_built)
    _num_built = place + 1
    return place


def marks(layers: Sequence[nn.Module], like: Tensor) -> Tensor:
    """Marks (4,) of layers in their order, of the type and on the device of `like`."""
    # Squares, because a backward pass adds its layers in the opposite order of the forward pass:
    # with n itself two layers and the same two exchanged would have one mark.
    places = [(n * n, layer.place) for n, layer in enumerate(layers, 1)]
    from_first = sum(weight * place for weight, place in places) % _MODULUS
    from_last = sum(weight * (_num_built - place) for weight, place in places) % _MODULUS
    numbers = [from_first, from_first**2, from_last, from_last**2]
    return torch.tensor(numbers, dtype=like.dtype, device=like.device)


def check_marks(total: Tensor) -> None:
    """Raise RuntimeError, on all ranks, unless marks summed over the ranks (4,) are all equal.

    On a GPU, where reading them would wait for it, the error is CUDA's failed assertion.
    """
    sums, squares = total.detach().double().view(2, 2).unbind(1)
    same = (squares * dist.get_world_size() == sums.square()).any()
    message = (
        "ranks add up the statistics of different normalization layers: every rank has to run the "
        "same layers in the same order (no LayerDrop with sync=True), and to build its models in "
        "the same order"
    )
    if same.is_cuda:
        torch._assert_async(same, message)
    elif not same:
        raise RuntimeError(message)
