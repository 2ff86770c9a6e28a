"""Other people's files: a command that fails, or is killed, at any moment leaves them as they were, byte for byte.

Moments are the command's own operations on files (Python's audit events). One that fails raises OSError, and the
command may clean up; one that kills is followed by no other operation at all.
"""

import shutil
import sys
from pathlib import Path

import pytest
from conftest import DATA, random_gpt2
from hypothesis import given, settings
from hypothesis import strategies as st

from recur_gpt2.cli.main import main

MINI = DATA / "gpt2-mini"
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "shutil.move", "os.truncate"}
SMALL = ["--model", "model", "--window", "8", "--device", "cpu", "--precision", "float32"]
STEPS = ["--steps", "2", "--save-every", "1", "--lanes", "2"]
COMMANDS = {
    "convert": ["convert", "--model", "model", "--window", "8", "--feature-map", "elu", "--output", "converted"],
    "embed": ["embed", "texts", "-o", "e.parquet", *SMALL],
    "evaluate": ["evaluate", "--data", "texts", "--protocols", "disjoint", "--json", "scores.json", *SMALL],
    "finetune": ["finetune", "--data", "texts", "--output-dir", "run", "--rows", "--no-control", *SMALL, *STEPS],
}
# Names that look like those that commands give to what is half written, and to checkpoints and parts.
STRANGERS = [
    "notes.unfinished",
    "mine.unfinished/chapter.txt",
    ".converted.unfinished/a.txt",
    ".converted.0123.unfinished",
    "converted.replaced/a.txt",
    ".e.parquet",
    "scores.json.bak",
    "run/notes.txt",
    "run/settings.json.bak",
    "run/recurrent/mine.unfinished/a.txt",
    "run/recurrent/checkpoints/step-by-step/a.txt",
    "run/recurrent/checkpoints/step-00000001.unfinished/a.txt",
    "run/recurrent/checkpoints/mine.unfinished",
    "e.parquet.parts/my notes.txt",
    "e.parquet.parts/000001.parquet.bak",
]


class Stopped(BaseException):
    """The process was killed."""


class Moments:
    """Counts operations on files below a folder, and stops the command at one of them."""

    def __init__(self):
        self.folder = self.at = None

    def __call__(self, event, args):
        if self.folder is None or not self._changes(event, args):
            return
        self.count += 1
        if self.killed and self.count >= self.at:
            raise Stopped
        if self.count == self.at:
            raise OSError(28, "No space left on device")

    def _changes(self, event, args):
        if event == "open":
            writes = isinstance(args[1], str) and any(letter in args[1] for letter in "wax+")
            return writes and str(args[0]).startswith(self.folder)
        return event in CHANGES and any(str(each).startswith(self.folder) for each in args[:2])

    def watch(self, folder, at, killed):
        self.folder, self.at, self.killed, self.count = str(folder), at, killed, 0


MOMENTS = Moments()
sys.addaudithook(MOMENTS)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "model"
    random_gpt2(n_layer=2, n_embd=8, n_head=2, vocab_size=8192, n_positions=16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MINI / name, folder)
    return folder


@pytest.fixture(scope="module")
def place(model, tmp_path_factory):
    """A function that makes a folder with the model, texts and strangers' files, and goes there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr("recur_gpt2.cli.process.tune_allocator", lambda: None)

        def make():
            folder = tmp_path_factory.mktemp("place")
            (folder / "model").symlink_to(model)
            (folder / "texts").mkdir()
            for number in range(4):
                (folder / "texts" / f"{number}.txt").write_text(f"It was text {number}, and it was read. " * 8)
            for name in STRANGERS:
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(f"somebody's {name}\n".encode())
            patch.chdir(folder)
            return folder

        yield make


def assert_strangers_are_there(folder):
    for name in STRANGERS:
        assert (folder / name).read_bytes() == f"somebody's {name}\n".encode(), name


def run(folder, command, at=None, killed=False):
    """-> exit status, or None if it was stopped by an exception."""
    MOMENTS.watch(folder, at, killed)
    try:
        return main(COMMANDS[command] + (["--resume"] if (folder / "run" / "settings.json").exists() else []))
    except (OSError, Stopped):
        return None
    finally:
        MOMENTS.folder = None


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
@settings(max_examples=8, deadline=None)
@given(at=st.integers(1, 40), killed=st.booleans())
def test_a_command_stopped_at_any_moment_leaves_strangers_files_alone(command, place, at, killed):
    """And so does the one that then comes to its end."""
    folder = place()
    run(folder, command, at, killed)
    assert_strangers_are_there(folder)
    assert run(folder, command) in ((0, 2) if command == "convert" else (0,))  # it does not write over what is there
    assert_strangers_are_there(folder)
    if command == "finetune":
        assert not list((folder / "run").rglob(".step-*"))


def test_a_folder_that_is_replaced_is_there_before_and_after(tmp_path, monkeypatch):
    """Killed between the two, one of them can be found beside the other."""
    from recur_gpt2.utils.files import whole_folder

    target = tmp_path / "model"
    for text in ("old", "new"):
        with whole_folder(target) as folder:
            (folder / "a.txt").write_text(text)
    assert (target / "a.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    renamed = Path.rename

    def killed_after_the_first(path, other):
        monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(Stopped))
        return renamed(path, other)

    monkeypatch.setattr(Path, "rename", killed_after_the_first)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(Stopped), whole_folder(target) as folder:
        (folder / "a.txt").write_text("newest")
    assert sorted(path.read_text() for path in tmp_path.rglob("a.txt")) == ["new", "newest"]
