"""How little memory a model of GPT-2 small's shape needs, to train and to score a long document, beside transformers.

    python benchmarks/bench_budget.py                       # both, in bfloat16 and float32
    python benchmarks/bench_budget.py --tasks scoring --tokens 20000

Training: a step has `--step-tokens` tokens on both sides, of one document: transformers reads them as one window,
plainly and with its gradient checkpointing; ours as windows that follow one another, with recomputation. The fixed part
is weights, gradients and both moments of AdamW in float32. Scoring: windows one at a time, ours with memory.
"""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace

import bench_scoring
import bench_training
from common import (
    GPT2_SHAPE,
    PEER,
    add_arguments,
    check_arguments,
    interleave,
    number,
    print_table,
    ratio,
    run,
    summarise,
)

MIB = 2**-20
FIXED = 4  # weights, gradients, two moments
AIMS = {"above_ratio": 0.2, "scoring_weights": 1.1, "scoring_bytes": 100e6}


def parse() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, precisions={"both": "one after the other", "bfloat16": "autocast", "float32": "throughout"})
    parser.set_defaults(model=GPT2_SHAPE, repeats=1)
    add = parser.add_argument
    add("--tasks", nargs="+", choices=["training", "scoring"], default=["training", "scoring"], help="default: both")
    add("--step-tokens", type=int, default=1024, help="of a training step, and transformers' window (default: 1024)")
    add("--windows", type=int, nargs="+", default=[256, 128, 64], metavar="T", help="ours (default: 256 128 64)")
    add("--steps", type=int, default=4, help="measured steps of a run, after two (default: 4)")
    add("--tokens", type=int, default=100_000, help="length of the document to score (default: 100000)")
    return check_arguments(parser, parser.parse_args())


def compare(args: Namespace) -> dict:
    result = {"benchmark": "budget", "aims": AIMS}
    for precision in ["bfloat16", "float32"] if args.precision == "both" else [args.precision]:
        if "training" in args.tasks:
            result[f"training_{precision}"] = _compare_training(args, precision)
        if "scoring" in args.tasks:
            result[f"scoring_{precision}"] = _compare_scoring(args, precision)
    return result


def _compare_training(args, precision):
    settings = vars(args) | {"task": "training", "precision": precision, "lanes": 1}
    whole = settings | {"window": args.step_tokens, "bptt": 1}
    variants = {
        PEER: whole | {"variant": PEER},
        "gradient checkpointing": whole | {"variant": bench_training.PEER_CHECKPOINTING},
    }
    for window in args.windows:
        parts = {"window": window, "bptt": args.step_tokens // window, "variant": "checkpointing"}
        variants[f"ours, window {window}"] = settings | parts
    summary = summarise(interleave(__file__, variants, args.repeats), PEER)
    rows = []
    for name, row in summary.items():
        share = ratio(row, "above_ratio", at_most=AIMS["above_ratio"] if name.startswith("ours") else None)
        memory = [number(row, key, MIB) for key in ("peak_memory_bytes", "fixed_bytes", "above_bytes")]
        rows.append([name, number(row, "tokens_per_second"), *memory, share])
    head = [f"training, {precision}", "tokens/s", "peak MiB", "fixed MiB", "above MiB", "ratio of that (aim <= 0.2)"]
    print_table(head, rows)
    return summary


def _compare_scoring(args, precision):
    settings = vars(args) | {"task": "scoring", "precision": precision, "block": 1}
    variants = {PEER: settings | {"window": args.step_tokens, "variant": PEER}}
    for window in args.windows:
        variants[f"ours, window {window}"] = settings | {"window": window, "variant": "default"}
    summary = summarise(interleave(__file__, variants, args.repeats), PEER)
    rows = []
    for name, row in summary.items():
        over = number(row, "over_aim_bytes", MIB)
        memory = [number(row, key, MIB) for key in ("peak_memory_bytes", "weight_bytes")]
        rows.append([name, number(row, "tokens_per_second"), *memory, over])
    head = [f"scoring, {precision}", "tokens/s", "peak MiB", "weights MiB", "over 1.1 weights + 100 MB (MiB)"]
    print_table(head, rows)
    return summary


def measure(settings: Namespace) -> dict:
    """One variant of one task."""
    if settings.task == "training":
        found = bench_training.measure(settings)
        above = found["peak_memory_bytes"] - FIXED * found["weight_bytes"]
        return found | {"fixed_bytes": FIXED * found["weight_bytes"], "above_bytes": above}
    found = bench_scoring.measure(settings)
    allowed = AIMS["scoring_weights"] * found["weight_bytes"] + AIMS["scoring_bytes"]
    return found | {"over_aim_bytes": found["peak_memory_bytes"] - allowed}


if __name__ == "__main__":
    sys.exit(run(parse, measure, compare))
