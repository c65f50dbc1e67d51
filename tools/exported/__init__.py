"""What tools/export.py compares."""
