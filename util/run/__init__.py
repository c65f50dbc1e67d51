"""A run over its lifetime: its folder, its state, its log, what it prints, and how it stops.

main.py and the tools that read runs use this room; the model and the losses do not.
"""

from util.run.checkpoints import BEST, scheduled_names
from util.run.console import (
    EpochSummary,
    announce,
    epoch_title,
    start_logging,
    what_is_kept,
)
from util.run.folder import RunFolder
from util.run.history import History
from util.run.record import record_start
from util.run.results import save_evaluation, write_evaluation
from util.run.state import TrainingPosition, TrainingState
from util.run.stop import StopRequest, StopVote
