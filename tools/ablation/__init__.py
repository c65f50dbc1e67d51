"""What tools/ablate.py does: variants from a grid, their runs, and the statistics of the differences.

Only tools/ablate.py uses this room.
"""
