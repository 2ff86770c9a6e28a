"""Files written whole or not at all: a reader, or a run killed halfway, never meets half a file. Whose a folder is.

Single files only; a folder of many files needs a scheme of its own.
"""

import os
import secrets
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError


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


def settings_file(folder: Path, what: str, *, resume: bool) -> Path:
    """Where the settings of a run, a sweep or whatever `what` is called lie in its folder.

    Raises:
        InputError: there is one and it is not to be resumed, or there is none and it is.
    """
    file = folder / "settings.json"
    if resume and not file.exists():
        raise InputError(f"there is nothing to resume in {folder}; leave out --resume to start")
    if file.exists() and not resume:
        raise InputError(f"{folder} already holds a {what}; give --resume to go on with it, or another --output-dir")
    return file
