"""Export of a detector to a file that runs without this project."""
