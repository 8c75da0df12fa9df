"""The plugin that fairseq loads: Transformers whose norms are chosen by name and site.

    import normexp.fairseq_plugin                                   # in Python
    fairseq-train ... --user-dir normexp/fairseq_plugin --arch ...  # any of fairseq's tools

Registers the models `normexp_transformer`, `normexp_transformer_lm` and `normexp_tensorized_lm`,
one architecture `normexp_<stem>` for every configs/model/<stem>.yaml, fairseq's criterions with
the layers' penalties as `normexp_<criterion>`, the task `normexp_language_modeling`, the optimizer
`normexp_adam`, and the types that checkpoints may hold. While it is loaded, fairseq leaves out no
sentences (patches.py) and refuses a checkpoint whose configuration it could run as code
(config_guard.py).
"""

import contextlib
import importlib
import sys
from pathlib import Path

_NAME = "normexp.fairseq_plugin"

if __name__ == _NAME:
    from normexp.fairseq_plugin import (  # noqa: F401
        adam,
        checkpoint_types,
        criterions,
        patches,
        streams,
        tensorized,
        transformer,
        transformer_lm,
    )
    from normexp.fairseq_plugin.architectures import register_architectures
    from normexp.fairseq_plugin.patches import check_configurations

    register_architectures()
    check_configurations()
    _while_loaded = contextlib.ExitStack()  # kept, because it would restore fairseq at its end
    _while_loaded.enter_context(patches.last_batches_kept())
else:
    # --user-dir imports this folder as a top-level module, after putting its parent on the path.
    # Registering happens under the canonical name only. The path entry becomes the folder above:
    # a clone then works uninstalled, and packages of normexp such as `config` do not hide other
    # projects' top-level modules of the same name.
    _entry, _root = str(Path(__file__).parents[1]), str(Path(__file__).parents[2])
    sys.path[:] = [_root if path == _entry else path for path in sys.path]
    _plugin = importlib.import_module(_NAME)
    if not Path(_plugin.__file__).samefile(__file__):
        raise ImportError(
            f"--user-dir is {Path(__file__).parent}, but {_NAME} is already imported from "
            f"{Path(_plugin.__file__).parent}; use that folder"
        )
