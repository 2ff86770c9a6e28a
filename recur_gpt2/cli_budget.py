"""The command line's part about memory: `recur-gpt2 recommend`, and `--memory-budget` of the main job."""

from __future__ import annotations

import argparse

from .errors import InputError

DEFAULTS = {"window": 256, "lanes": 8, "bptt": 4, "accumulate": 1}  # of the main job without a budget
OF_A_STEP = ("lanes", "bptt", "accumulate", "parallel_windows")


def add_recommend_arguments(parser: argparse.ArgumentParser, *, model: str) -> None:
    add = parser.add_argument
    add("--model", default=model, help="GPT-2 or recur_gpt2 model: hub id or folder (default: data/gpt2-mini)")
    add("--budget", required=True, metavar="2GiB", help="memory above what Python and its libraries take")
    add("--task", default="train", choices=["train", "score", "embed"], help="default: train")
    add("--data", default="pg19-sample", help="documents, for the command that is printed (default: pg19-sample)")
    add("--window", type=int, help="T; default: the largest that fits")
    add("--recurrence", default="default", help="for a GPT-2: default, yoshida2020 or none")
    add("--precision", choices=["float32", "bfloat16"], help="default: what this processor is made for")


def run_recommend(args: argparse.Namespace) -> None:
    """Print settings and the command that runs them."""
    from .recommendation import command, parse_bytes, recommend, settings_line

    found = recommend(
        args.model,
        parse_bytes(args.budget),
        args.task,
        windows=None if args.window is None else (args.window,),
        recurrence=args.recurrence,
        precision=args.precision,
    )
    print(settings_line(found))
    print(command(found, args.model, args.data))


def settle(args: argparse.Namespace, options: dict) -> None:
    """Fill in what was not given of the settings that take memory: the defaults, or what a budget allows.

    Args:
        options: fields of RecurGPT2Config for the model.

    Raises:
        InputError: a budget and settings that it is to choose were given, or nothing fits.
    """
    if args.memory_budget is not None:
        _fit(args, options)
    for name, value in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def _fit(args, options):
    from .recommendation import parse_bytes, recommend, settings_line

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
        options=options,
    )
    args.window, args.accumulate = found.config.window, found.accumulate
    args.lanes, args.bptt = found.workload.lanes, found.workload.windows
    args.checkpointing, args.precision = found.workload.checkpointing, found.workload.precision
    print(settings_line(found))
