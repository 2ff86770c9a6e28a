"""`recur-gpt2 finetune` in processes of their own, once for each folder: what ablations and comparisons are made of."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ..utils.files import atomic_write_text
from ..utils.thread_cache import tuned_environment


def finetuned(folder: Path, flags: list[str]) -> dict:
    """What results.json of the folder holds, after a run with these flags if it holds none; a run begun goes on.

    Raises:
        subprocess.CalledProcessError: the run failed, and said why on its own error output.
    """
    results = folder / "results.json"
    if not results.exists():
        command = [sys.executable, "-m", "recur_gpt2.cli", "finetune", "--output-dir", str(folder), *flags]
        command += ["--resume"] if (folder / "settings.json").exists() else []
        print("+", shlex.join(command), flush=True)
        subprocess.run(command, check=True, env=tuned_environment())
    return json.loads(results.read_text())


class Record:
    """What runs found, in one JSON file that is written whole after each; a run that it holds is not made again."""

    def __init__(self, path: Path):
        self.path = path
        self.found = json.loads(path.read_text()) if path.exists() else {}

    def at(self, *keys: str) -> dict:
        """The part of the record under these keys."""
        part = self.found
        for key in keys:
            part = part.setdefault(key, {})
        return part

    def once(self, part: dict, name: str, find: Callable[[], dict]) -> None:
        """Keep what `find` gives as `part[name]`, unless something is kept there."""
        if name not in part:
            part[name] = find()
            atomic_write_text(self.path, json.dumps(self.found, indent=1) + "\n")
