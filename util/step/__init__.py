"""What a training step needs beside the model: updater, log, precision, finite checks, random state.

The models, the training loop and the state of a run use this room.
"""

from util.step.deterministic import explaining_refusals, make_deterministic
from util.step.log import StepLog
from util.step.metrics import EpochSums
from util.step.not_finite import FiniteWatch
from util.step.precision_check import check_precision
from util.step.random_state import RandomGenerators, seed_everything
from util.step.updater import Updater, build_updater

__all__ = [
    "EpochSums",
    "FiniteWatch",
    "RandomGenerators",
    "StepLog",
    "Updater",
    "build_updater",
    "check_precision",
    "explaining_refusals",
    "make_deterministic",
    "seed_everything",
]
