"""What every other layer uses. It imports nothing of the project outside itself."""
