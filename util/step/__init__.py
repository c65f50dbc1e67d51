"""What a training step needs beside the model: precision, copies between host and device, finite
checks, random state and running means. The models, the loop and the state of a run use this room.
"""
