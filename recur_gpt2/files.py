"""Files written whole or not at all: a reader, or a run killed halfway, never meets half a file.

Single files only; a folder of many files needs a scheme of its own.
"""

import os
import secrets
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path):
    """A temporary path beside `path`, renamed to it if the block succeeds and removed if it does not.

    The block must write a file there. The temporary name keeps the suffix, which some writers go by.
    """
    path = Path(path)
    # Not tempfile: its files are readable by their owner alone, and the rename would keep that.
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_text(path, text):
    """Write `text` as UTF-8 to `path`, whole or not at all, with the same line ends on every system."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
