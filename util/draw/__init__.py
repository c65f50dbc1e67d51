"""Drawings: boxes and attention on pictures, and curves of a run.

The tools, the report and TensorBoard use this room; training itself does not.
"""
