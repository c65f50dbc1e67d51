"""What one training step needs beside the model: precision, copies between host and device, finite checks, random state, running means.
The models, the training loop and the state of a run use this room.
"""
