"""What a file of weights holds: its layout, its architecture, and which weights to take.

The builder, load_detector and the tools use this room; modules of the network do not.
"""

from models.weights.architecture import adopt
from models.weights.load import read_trained
from models.weights.start import find_start, load_checkpoint

__all__ = ["adopt", "find_start", "load_checkpoint", "read_trained"]
