"""The processes of one run: the process group, the launchers that start them, and the watchdog that
explains a failed exchange. Every room above may use this one; it does not depend on training.
"""
