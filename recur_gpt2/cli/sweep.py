"""`recur-gpt2 sweep`: measure perplexity against memory and computation."""

from __future__ import annotations

import argparse

from ..budget.sweep.arguments import SweepArguments
from .flags import add_flags, lanes, settings_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, SweepArguments, leave_out=("budgets", "lanes"))
    parser.add_argument(
        "--budget", nargs="+", metavar="512MiB", help="memory to try (default: from the least that holds a point up)"
    )
    parser.add_argument(
        "--lanes", type=lanes, default="auto", help="documents read in one batch; auto: as many as fit (default)"
    )


def run(args: argparse.Namespace) -> None:
    """Sweep, and say where recurrence is worth its cost."""
    from ..budget.recommend import parse_bytes
    from ..budget.sweep.report import verdicts
    from ..budget.sweep.run import run_sweep

    budgets = None if args.budget is None else [parse_bytes(text) for text in args.budget]
    print(verdicts(run_sweep(settings_of(SweepArguments, args, budgets=budgets))))
