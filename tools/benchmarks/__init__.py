"""What benchmark.py measures, a module for each of its modes.

A mode is a function of the flags and the Config that prints what it finds. The attention operator
has its own in models/ops/benchmark.py.
"""
