"""Faults by package, each one line of normexp replaced."""

from faults.corpora import CORPORA
from faults.evaluation import EVALUATION
from faults.fault import Fault
from faults.norms import NORMS
from faults.plugin import PLUGIN
from faults.runs import RUNS
from faults.training import TRAINING

FAULTS: list[Fault] = [*NORMS, *RUNS, *TRAINING, *EVALUATION, *CORPORA, *PLUGIN]
