"""`recur-gpt2 evaluate`: score documents with a model, by any protocol."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..evaluation.arguments import EvaluationArguments
from ..utils.files import atomic_write_text, check_can_write
from .flags import add_flags, settings_of
from .process import is_main


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, EvaluationArguments)
    parser.add_argument("--json", type=Path, help="write the rows to this file too, with the loss of each document")


def run(args: argparse.Namespace) -> None:
    """Score documents and print a table."""
    if not is_main():
        return  # one process evaluates
    from ..evaluation.report import format_table, horizon_table
    from ..evaluation.scoring import evaluate_model

    if args.json:
        check_can_write(args.json)
    scored = evaluate_model(settings_of(EvaluationArguments, args))
    if args.json:
        atomic_write_text(args.json, json.dumps(scored, indent=1) + "\n")
    print(scored["split_rule"] or f"{len(scored['tokens_by_document'])} documents of {args.data}", file=sys.stderr)
    print(format_table(scored["rows"]))
    if "horizons" in scored:
        print("", horizon_table(scored["horizons"]), sep="\n")
