"""What every other layer stands on; imports nothing of the project outside itself."""
