"""How a command runs in its process: exit statuses, and which of several processes prints."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress

from ..errors import InputError
from ..utils.allocator import tune_allocator

BROKEN_PIPE = 141  # exit status, as of a program that the system ends for it


def guarded(run: Callable[[], None]) -> int:
    """Run a command; returns its exit status."""
    tune_allocator()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading weights; ours stay
    from ..training.distributed import ElsewhereError, leave

    try:
        run()
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        return BROKEN_PIPE
    except ElsewhereError:
        return 2
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        if is_main():
            print(f"interrupted: {interrupt}" if str(interrupt) else "interrupted", file=sys.stderr)
        return 130
    finally:
        leave()
    return 0


def _discard_output():
    """Nobody reads what is printed (`| head`): what is still held back must not fail when the process ends."""
    with suppress(OSError, ValueError):  # where stdout is no file of the system
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_main():
    """Whether this is the main one of the processes that were started together, if there are several."""
    return os.environ.get("RANK", "0") == "0"
