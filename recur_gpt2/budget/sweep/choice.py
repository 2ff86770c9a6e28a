"""The best of what a sweep measured within a memory budget. `recommend.py` chooses without a sweep."""

from __future__ import annotations

import json
import math
from pathlib import Path

from ...errors import InputError
from ...models.configuration import with_window
from ...models.hub import load_config
from ..memory_model import Workload, memory_use
from ..recommend import Recommendation, room
from .arguments import METHODS
from .plots import scored


def best_measured(folder: Path, budget: int, task: str) -> tuple[dict, Recommendation]:
    """The point of a sweep that predicts best among those that stay within a budget; of equals the fastest.

    Args:
        folder: --output-dir of `recur-gpt2 sweep`.
        budget: bytes above what the interpreter and its libraries take.

    Returns:
        The point as a row of results.jsonl, and its settings.

    Raises:
        InputError: there is no sweep of that task, or nothing in it fits; it says the least that would.
    """
    settings, rows = _read(Path(folder))
    if settings["task"] != task:
        raise InputError(
            f"the sweep in {folder} measured {settings['task']}, not {task}; give --task {settings['task']}"
        )
    points = scored(rows, "peak_memory_bytes")
    least = min((room(row["peak_memory_bytes"]) for row in points), default=math.inf)
    if least > budget:
        raise InputError(
            f"nothing that the sweep in {folder} scored fits in {budget / 2**20:,.0f} MiB: "
            + (f"the least is {least / 2**20:,.0f} MiB" if points else "it scored nothing")
            + "; leave out --sweep to go by the formulas"
        )
    fitting = [row for row in points if room(row["peak_memory_bytes"]) <= budget]
    best = min(fitting, key=lambda row: (row["nats"], -row["tokens_per_second"]))
    return best, _settings(best, load_config(settings["model"]))


def _read(folder):
    try:
        settings = json.loads((folder / "settings.json").read_text())
        return settings, [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder} holds no sweep ({error}); give the --output-dir of recur-gpt2 sweep") from error


def _settings(row, gpt2):
    config = with_window(gpt2, row["window"], **METHODS[row["method"]].options(row["window"]))
    workload = Workload(row["task"], **row["settings"])
    return Recommendation(config, workload, memory_use(config, workload), row["flops_per_token"])
