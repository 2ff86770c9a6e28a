"""The command line about memory: `recur-gpt2 recommend`, `recur-gpt2 sweep`, and `--memory-budget` of the main job."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from ..errors import InputError

DEFAULTS = {"window": 256, "lanes": 8, "bptt": 4, "accumulate": 1}  # of the main job without a budget
TASKS = ["train", "score", "embed", "generate"]  # memory.py's, which takes PyTorch to be asked
OF_A_STEP = ("bptt", "accumulate", "parallel_windows")


def add_recommend_arguments(parser: argparse.ArgumentParser, *, model: str) -> None:
    add = parser.add_argument
    add("--model", default=model, help="GPT-2 or recur_gpt2 model: hub id or folder (default: data/gpt2-mini)")
    add("--budget", required=True, metavar="2GiB", help="memory above what Python and its libraries take")
    add("--task", default="train", choices=TASKS, help="default: train")
    add("--data", default="pg19-sample", help="documents, for the command that is printed (default: pg19-sample)")
    add("--window", type=int, help="T; default: the largest that fits")
    add("--recurrence", default="default", help="for a GPT-2: default, yoshida2020 or none")
    add("--precision", choices=["float32", "bfloat16"], help="default: what this processor is made for")
    add("--lanes", type=_lanes, help="train: no more documents side by side than these (default: 16)")
    add("--sweep", type=Path, help="choose among what recur-gpt2 sweep measured: its --output-dir")


def run_recommend(args: argparse.Namespace) -> None:
    """Print settings and the command that runs them."""
    from ..budget.recommend import command, parse_bytes, recommend, settings_line

    if args.sweep is not None:
        _recommend_measured(args)
        return
    found = recommend(
        args.model,
        parse_bytes(args.budget),
        args.task,
        windows=None if args.window is None else (args.window,),
        recurrence=args.recurrence,
        precision=args.precision,
        most_lanes=args.lanes,
    )
    print(settings_line(found))
    print(command(found, args.model, args.data))


def _recommend_measured(args):
    from ..budget.recommend import command, parse_bytes, settings_line
    from ..budget.sweep.choice import best_measured
    from ..budget.sweep.models import METHODS

    row, found = best_measured(args.sweep, parse_bytes(args.budget), args.task)
    print(settings_line(found))
    low, high = row["nats_interval"]
    print(
        f"{row['method']}: {row['peak_memory_bytes'] / 2**20:,.0f} MiB and {row['tokens_per_second']:,.0f} tokens/s "
        f"measured; token perplexity {row['token_ppl']:,.2f}, {row['nats']:.4f} nats ({low:.4f} to {high:.4f})"
    )
    model = args.model if args.task == "train" else row["model"]
    print(command(found, model, args.data, METHODS[row["method"]].protocol))


def add_sweep_arguments(parser: argparse.ArgumentParser, *, model: str) -> None:
    add = parser.add_argument
    add("--model", default=model, help="GPT-2 checkpoint: hub id or folder (default: data/gpt2-mini)")
    add("--data", default="pg19-sample", help="documents, as for finetune (default: pg19-sample)")
    add("--task", default="train", choices=TASKS, help="what memory and speed are measured of (default: train)")
    add("--budget", nargs="+", metavar="512MiB", help="memory to try (default: from the least that holds a point up)")
    add("--windows", type=int, nargs="+", help="T (default: 64 128 256 512 1024)")
    add(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="of disjoint, overlap, recurrent, recurrent+overlap, t2r, recurrent+t2r (default: all that the task has)",
    )
    add("--lanes", type=_lanes, default="auto", help="documents read side by side; auto: as many as fit (default)")
    add("--finetune-tokens", type=int, default=327680, help="of every finetuning (default: 327680)")
    add("--finetuned", type=Path, help="models and scores to use and add to, an earlier sweep's or your own")
    splits = ["train", "validation", "test"]
    add("--eval-split", default="test", choices=splits, help="documents to score (default: test)")
    add("--eval-tokens", type=int, default=147456, help="to score, 0: memory and speed alone (default: 147456)")
    add("--precision", choices=["float32", "bfloat16"], help="default: what this processor is made for")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="default: a GPU if there is one")
    add("--output-dir", type=Path, required=True, help="folder for results.jsonl, results.csv, report.md and pictures")
    add("--resume", action="store_true", help="go on with what an earlier sweep in --output-dir left")


def _lanes(text):
    if text == "auto":
        return None
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of lanes; give auto, or 1 or more")
    return int(text)


def run_sweep_command(args: argparse.Namespace) -> None:
    """Sweep, and say where recurrence is worth its cost."""
    from ..budget.recommend import parse_bytes
    from ..budget.sweep.report import verdicts
    from ..budget.sweep.run import SweepArguments, run_sweep

    given = {field.name: getattr(args, field.name) for field in fields(SweepArguments) if hasattr(args, field.name)}
    budgets = None if args.budget is None else [parse_bytes(text) for text in args.budget]
    print(verdicts(run_sweep(SweepArguments(**given, budgets=budgets))))


def settle(args: argparse.Namespace, options: dict, *, quiet: bool = False) -> None:
    """Fill in what was not given of the settings that take memory: the defaults, or what a budget allows.

    Args:
        options: fields of RecurGPT2Config for the model.
        quiet: do not print what a budget led to; another process does.

    Raises:
        InputError: a budget and settings that it is to choose were given, or nothing fits.
    """
    if args.memory_budget is not None:
        _fit(args, options, quiet)
    for name, value in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def _fit(args, options, quiet):
    from ..budget.recommend import parse_bytes, recommend, settings_line

    given = [name for name in OF_A_STEP if getattr(args, name) is not None]
    if given or args.checkpointing:
        name = given[0] if given else "checkpointing"
        raise InputError(f"--memory-budget chooses --{name.replace('_', '-')} itself; leave one of them out")
    found = recommend(
        args.model,
        parse_bytes(args.memory_budget),
        windows=None if args.window is None else (args.window,),
        recurrence=args.recurrence,
        precision=None if args.precision == "auto" else args.precision,
        most_lanes=args.lanes,
        options=options,
    )
    args.window, args.accumulate = found.config.window, found.workload.accumulate
    args.lanes, args.bptt = found.workload.lanes, found.workload.windows
    args.checkpointing, args.precision = found.workload.checkpointing, found.workload.precision
    if not quiet:
        print(settings_line(found))
