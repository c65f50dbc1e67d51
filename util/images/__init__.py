"""Pictures and videos from files: read safely, turned upright, resized and normalised.
Data sets, prediction and tools use this room; it knows nothing of detectors.
"""
