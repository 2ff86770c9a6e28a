"""`recur-gpt2 recommend`: settings that fit a memory budget, and the command."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..budget.tasks import TASKS
from ..data.bundle import BUNDLED_MODEL
from .flags import lanes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        default=str(BUNDLED_MODEL),
        help="GPT-2 or recur_gpt2 model: hub id or folder (default: data/gpt2-mini)",
    )
    add("--budget", required=True, metavar="2GiB", help="memory above what Python and its libraries take")
    add("--task", default="train", choices=TASKS, help="default: train")
    add("--data", default="pg19-sample", help="documents, for the command that is printed (default: pg19-sample)")
    add("--window", type=int, help="T; default: the largest that fits")
    add("--recurrence", default="default", help="for a GPT-2: default, yoshida2020 or none")
    add("--precision", choices=["float32", "bfloat16"], help="default: what this processor is made for")
    add("--lanes", type=lanes, help="train: no more documents side by side than these (default: 16)")
    add("--sweep", type=Path, help="choose among what recur-gpt2 sweep measured: its --output-dir")


def run(args: argparse.Namespace) -> None:
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
    from ..budget.sweep.arguments import METHODS
    from ..budget.sweep.choice import best_measured

    row, found = best_measured(args.sweep, parse_bytes(args.budget), args.task)
    print(settings_line(found))
    low, high = row["nats_interval"]
    print(
        f"{row['method']}: {row['peak_memory_bytes'] / 2**20:,.0f} MiB and {row['tokens_per_second']:,.0f} tokens/s "
        f"measured; token perplexity {row['token_ppl']:,.2f}, {row['nats']:.4f} nats ({low:.4f} to {high:.4f})"
    )
    model = args.model if args.task == "train" else row["model"]
    print(command(found, model, args.data, METHODS[row["method"]].protocol))
