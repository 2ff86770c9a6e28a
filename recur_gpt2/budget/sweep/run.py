"""A memory-budget sweep: for each budget, method and window what finetuning or reading costs, and how well it predicts.

Memory and speed are measured for each point with settings that fit its budget (points.py). How well a model
predicts is a matter of method and window alone, since every optimizer step has as many tokens in segments of one
length, however many lanes it takes at a time: one finetuning serves all budgets (models.py). Rows are kept as
they come, so that a sweep can be stopped and gone on with. Pictures and words are report.py's.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from itertools import product

import torch

from ...errors import InputError
from ...evaluation.protocols import PROTOCOLS
from ...models.hub import load_config
from ...utils.device import checked_device
from ...utils.files import atomic_write_text, settings_file
from ...utils.measure import STATUS
from ..recommend import default_precision
from ..tasks import STEP_TOKENS
from ..worker import FAILED
from .arguments import METHODS, SweepArguments
from .models import LANES, SweepModels
from .points import READ_TOKENS, STEPS, UNSCORED, SweepPoints, lengths_of
from .report import write_report

LENGTH_WINDOW = 256  # at which documents of growing length are read, if the sweep has it
STARTING = 25_000  # tokens that could be trained on in the time that a process takes to start, roughly
UNCHANGING = ("model", "data", "task", "lanes", "finetune_tokens", "eval_split", "eval_tokens", "precision", "device")


def run_sweep(args: SweepArguments) -> list[dict]:
    """Measure, finetune, score, record, report; what is recorded is not done again. -> all rows, as results.jsonl's

    Raises:
        InputError: bad input of any kind; nothing that an earlier sweep wrote is lost.
        KeyboardInterrupt: after Ctrl-C, with all rows so far recorded and reported.
    """
    if not STATUS.exists():
        raise InputError(f"a sweep measures memory by {STATUS}, which is not here; run it on Linux")
    args.device = checked_device(args.device)
    points = _points(args)
    if points.scored:
        points.models.check_data((METHODS[name], window) for name, window in product(args.methods, args.windows))
    settings = _settings(args)
    rows = _claim(args, settings)
    try:
        _run(args, points, rows)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what was measured is in {args.output_dir}; give --resume to go on") from None
    finally:
        if rows:
            write_report(rows, settings, args.output_dir)
    return rows


def _points(args):
    """What makes the rows; with it the windows and budgets that were not given."""
    config = load_config(args.model)
    if config.model_type != "gpt2":
        raise InputError(f"{args.model} is a {config.model_type} model; a sweep starts from a GPT-2")
    longest = config.n_positions
    args.windows = args.windows or [window for window in (64, 128, 256, 512, 1024) if window <= longest] or [longest]
    if max(args.windows) > longest:
        raise InputError(f"window={max(args.windows)} exceeds the model's {longest} positions; leave it out")
    models = SweepModels(
        folder=args.finetuned,
        model=args.model,
        data=args.data,
        finetune_tokens=args.finetune_tokens,
        eval_split=args.eval_split,
        eval_tokens=args.eval_tokens,
        precision=args.precision or default_precision("train"),
        device=args.device,
        most_lanes=min(args.lanes or LANES, LANES),
    )
    options = {"task": args.task, "lanes": args.lanes, "precision": args.precision}
    points = SweepPoints(config, models, **options, scored=args.eval_tokens > 0)
    everything = product(args.methods, args.windows)
    uses = [each.use.total for method, window in everything for each in points.candidates(method, window)]
    if not uses:
        raise InputError(f"no settings have lanes={args.lanes}; give a power of two, or leave it out")
    args.budgets = args.budgets or _ladder(min(uses), max(uses))
    points.most = max(args.budgets)
    return points


def _ladder(least, most):
    """Powers of two and what lies halfway between them: the first that is no less than `least` to the first that is no
    less than `most`."""
    rungs = [halves << power for power in range(60) for halves in (2, 3)]
    first, last = (next(n for n, rung in enumerate(rungs) if rung >= size) for size in (least, most))
    return rungs[first : last + 1]


def _settings(args):
    """As report.py takes them."""
    machine = {"device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu"}
    machine |= {"threads": torch.get_num_threads()}
    machine |= {name: version(name) for name in ("recur-gpt2", "torch", "transformers")}
    folders = {name: str(getattr(args, name)) for name in ("output_dir", "finetuned")}
    return asdict(args) | folders | {"command": shlex.join(["recur-gpt2", *sys.argv[1:]]), "machine": machine}


def _claim(args, settings):
    """Make the output folder ours, or go on with what it holds, or refuse. -> the rows there"""
    file, results = settings_file(args.output_dir, "sweep", resume=args.resume), _results(args)
    before = json.loads(file.read_text()) if file.exists() else settings
    changed = next((name for name in UNCHANGING if before[name] != settings[name]), None)
    if changed:
        raise InputError(
            f"the sweep in {args.output_dir} has {changed}={before[changed]!r}, not {settings[changed]!r}; give that, "
            f"or another --output-dir"
        )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    atomic_write_text(file, json.dumps(settings, indent=1) + "\n")
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    return [row for row in rows if row["status"] != FAILED]  # those are tried again


def _results(args):
    return args.output_dir / "results.jsonl"


def _run(args, points, rows):
    """Make all rows that are not there yet."""
    tasks = list(_tasks(args, points, rows))
    progress = _Progress(sum(work for _, work, _ in tasks))
    for name, work, make in tasks:
        progress.say(name)
        rows += make() or ()
        atomic_write_text(_results(args), "".join(json.dumps(row) + "\n" for row in rows))
        progress.add(work)
    print(f"{len(rows)} rows, report and pictures: {args.output_dir}", flush=True)


def _tasks(args, points, rows):
    """(name, work, what makes the rows) for each method at each window, and for each length."""
    done = {(row["method"], row["window"], row.get("budget_bytes"), row.get("length")) for row in rows}
    missing = set()
    for window in args.windows:
        for method in args.methods:
            unscored = [row for row in rows if UNSCORED in row and (row["method"], row["window"]) == (method, window)]
            if unscored:
                work = _work(args, METHODS[method], 0, finetuned=True)
                yield f"{method}, window {window}, its score", work, partial(points.score, unscored)
            # Each budget, and what takes least: between budgets it says from where on a method is there at all.
            budgets = [budget for budget in [*args.budgets, None] if (method, window, budget, None) not in done]
            if budgets:
                new = points.scored and points.models.missing(METHODS[method], window)
                new = new and (METHODS[method].model, window) not in missing
                missing |= {(METHODS[method].model, window)} if new else set()
                work = _work(args, METHODS[method], len(budgets), finetuned=new)
                yield f"{method}, window {window}", work, partial(points.points, method, window, budgets)
    window = LENGTH_WINDOW if LENGTH_WINDOW in args.windows else args.windows[len(args.windows) // 2]
    for method in args.methods:
        for length in lengths_of(args.task):
            if (method, window, None, length) not in done:
                name = f"{method}, window {window}, a document of {length:,} tokens"
                yield name, STARTING + length, partial(points.length, method, window, length)


def _work(args, method, budgets, *, finetuned):
    """How long the rows of a method at a window take, in tokens trained on; reading is a third of it."""
    step = STEPS * STEP_TOKENS if args.task == "train" else READ_TOKENS / 3
    scored = args.eval_tokens * PROTOCOLS[method.protocol].passes / 3
    work = budgets * (STARTING + step) + (STARTING + scored if scored else 0)
    return work + (STARTING + args.finetune_tokens if finetuned else 0)


class _Progress:
    """A line for each task, with the time that is left if all go at the pace so far. Lines and no bar: what runs in
    the processes of the tasks has bars of its own."""

    def __init__(self, total):
        self.total, self.done, self.started = total, 0, time.monotonic()

    def say(self, name):
        left = (time.monotonic() - self.started) * (self.total - self.done) / self.done if self.done else None
        about = "" if left is None else f", about {left / 60:,.0f} min left"
        print(f"[{self.done / self.total:4.0%}{about}] {name}", flush=True)

    def add(self, work):
        self.done += work
