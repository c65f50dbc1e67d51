"""The processes of one run: the process group, what starts them, and the watchdog that explains a hang.
Every layer above may use this room; it knows nothing of training.
"""
