"""python -m datasets.synthetic: write a data set of generated pictures."""

from datasets.synthetic import main
from util.errors import run_as_command

if __name__ == "__main__":
    run_as_command(main)
