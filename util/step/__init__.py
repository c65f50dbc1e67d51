"""What a training step needs beside the model: updater, log, precision, finite checks, random state.

The models, the training loop and the state of a run use this room.
"""
