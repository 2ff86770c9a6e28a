"""Files and folders written whole or not at all: a reader, or a run killed halfway, never meets half of one."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from ..errors import InputError

UNFINISHED = "unfinished"


def name_of(path: str | Path) -> str:
    """A file's name as text that can be written anywhere, whatever bytes it is made of."""
    return os.fsencode(path).decode("utf-8", "replace")


def check_can_write(path: Path, *, folder: bool = False) -> None:
    """To be called before any work is done for a file, or for a folder of files; neither need exist yet.

    Raises:
        InputError: it could not be written.
    """
    if not folder and path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file")
    try:
        first = (path if folder else path.parent).absolute()
        with TemporaryFile(dir=next(each for each in (first, *first.parents) if each.exists())):
            pass
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); give another place") from None


@contextmanager
def atomic_path(path):
    """A temporary path beside `path`, renamed to it if the block succeeds and removed if it does not.

    The block must write a file there. The temporary name keeps the suffix, which some writers go by. Folders on the
    way are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files are readable by their owner alone, and the rename would keep that.
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises InputError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} could not be read ({error}); give a UTF-8 text file") from error


def atomic_write_text(path, text):
    """Write `text` as UTF-8 to `path`, whole or not at all, with the same line ends on every system."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace", newline="\n")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write files in, which takes `target`'s place if the block succeeds and vanishes if it does not.

    A folder that stands there already is put aside first, and deleted last: a crash in between loses neither.
    """
    unfinished, aside = (_beside(target, ending) for ending in (UNFINISHED, "replaced"))
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        if target.exists():
            target.rename(aside)
        unfinished.rename(target)
    except BaseException:
        if aside.exists() and not target.exists():
            aside.rename(target)
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def clear_unfinished(folder: Path, name: str) -> None:
    """Delete what a killed run left of `whole_folder(folder / name)`. Only for folders that one run alone writes to.

    Args:
        name: of the target; * and ? as in a glob.
    """
    for rest in folder.glob(f".{name}.{'[0-9a-f]' * 8}.{UNFINISHED}"):
        shutil.rmtree(rest)


def _beside(target, ending):
    """A name beside the target that nobody else has."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.{ending}")


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
    check_can_write(folder, folder=True)
    return file
