"""``python -m argosy``: the same program as the ``argosy`` command. It holds no logic of its own."""

import sys

from argosy.cli.main import run_program

if __name__ == "__main__":
    sys.exit(run_program())
