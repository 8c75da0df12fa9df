"""Which parameters of a model are a norm's, so that weight decay treats all norms alike."""

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from normexp.norms.registry import available_norms, norm_class


def norm_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters of a model that belong to norms, of this package or of torch.

    Recipes leave norms out of weight decay, but recognise them by class or name: transformers'
    Trainer does not decay an `ln_1` that is an nn.LayerNorm and decays every other norm there, so
    that a comparison of norms would also be one of weight decays.
    """
    kinds = (
        *(norm_class(name) for name in available_norms()),
        *(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase),
    )
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, kinds)
        for name, _ in module.named_parameters(remove_duplicate=False)
    }
