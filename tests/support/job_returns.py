"""A callback of Hydra's that writes down what its sweepers see of every run."""

import json
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback


class JobReturns(Callback):
    """Appends (status, returned value) of each job to a file as one JSON line."""

    def __init__(self, path: str):
        self.path = Path(path)

    def on_job_end(self, config: Any, job_return: JobReturn, **_: Any) -> None:
        value = job_return._return_value
        shown = str(value) if isinstance(value, Exception) else value
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([job_return.status.name, shown]) + "\n")
