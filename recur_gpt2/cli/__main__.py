"""`recur-gpt2`, and `python -m recur_gpt2.cli`."""

import sys

from ..utils.thread_cache import restart_tuned
from .main import main


def run() -> int:
    """Entry point of `recur-gpt2`."""
    restart_tuned()
    return main()


if __name__ == "__main__":
    sys.exit(run())
