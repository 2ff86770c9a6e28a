"""`recur-gpt2 finetune`, and the main job: finetune a GPT-2 with recurrence and without, and compare them."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from ..errors import InputError
from ..evaluation.arguments import ComparisonArguments
from ..models.arguments import LinearAttentionOptions
from ..training.arguments import TrainingArguments
from .convert import LAYERS, add_linear_arguments, layer_names
from .flags import add_flags, settings_of

SLOTS = ("sink_slots", "last_slots", "pooled_slots")
# What a memory budget chooses; without one the defaults.
CHOSEN = {"window": ComparisonArguments, "lanes": TrainingArguments, "bptt": TrainingArguments}
CHOSEN |= {"accumulate": TrainingArguments}
OF_A_STEP = ("bptt", "accumulate", "parallel_windows")
FIXED = ("warmup", "weight_decay", "clip", "recurrent")  # settings that are no flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a comparison."""
    add = parser.add_argument
    add_flags(
        parser,
        ComparisonArguments,
        leave_out=("model_options", "training", "control", "rows"),
        unset=CHOSEN,
        output_dir=None,
    )
    add("--rows", nargs="*", help="rows of the comparison to score; none after the flag: finetune only (default: all)")
    add("--memory-budget", metavar="2GiB", help="choose window and lanes so that finetuning fits in this")
    add("--no-control", action="store_true", help="leave out finetuning without recurrence")
    add_flags(parser, TrainingArguments, leave_out=FIXED, unset=CHOSEN)
    for slots in SLOTS:
        add(f"--{slots.replace('_', '-')}", type=int, help="of the memory, a layer (default: the preset's)")
    add(
        "--pointer-slots", type=int, help="positions of the document that the head may point at (default: the preset's)"
    )
    add("--insert-layers", type=int, nargs="+", help="layers that attend to memory (default: the preset's)")
    add("--attention", default="softmax", choices=["softmax", "t2r"], help="t2r: linear attention (default: softmax)")
    add_linear_arguments(parser, "--t2r-layers")


def run(args: argparse.Namespace, name: str | None = None) -> None:
    """Run the comparison and print its table."""
    from ..evaluation.comparison import run_comparison
    from ..evaluation.report import finding, format_table
    from ..training.distributed import Processes

    processes = Processes(args.device)
    with processes.agreeing():
        options = _model_options(args)
        settle(args, options, quiet=not processes.is_main)
        args.output_dir = args.output_dir or Path("runs") / f"{name or Path(args.data).stem}-w{args.window}"
        training = settings_of(TrainingArguments, args)
        comparison = settings_of(
            ComparisonArguments, args, model_options=options, training=training, control=not args.no_control
        )
    results = run_comparison(comparison)
    if results is None:
        return  # the main process has them
    print(format_table(results["rows"]))
    print()
    print(finding(results["rows"]))
    print(f"Report, plots and models: {results['settings']['output_dir']}")


def _model_options(args):
    """Fields of RecurGPT2Config that the flags give."""
    options = {key: getattr(args, key) for key in (*SLOTS, "pointer_slots", "insert_layers")}
    options = {key: value for key, value in options.items() if value is not None}
    linear, default = asdict(settings_of(LinearAttentionOptions, args)), asdict(LinearAttentionOptions())
    if args.attention == "t2r":
        return options | {"linear_layers": layer_names(args.t2r_layers)} | linear
    given = ["t2r_layers"] if args.t2r_layers != LAYERS else []
    given += [key for key, value in linear.items() if value != default[key]]
    if given:
        raise InputError(f"--{given[0].replace('_', '-')} is for linear attention; add --attention t2r")
    return options


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
    for name, settings in CHOSEN.items():
        if getattr(args, name) is None:
            setattr(args, name, getattr(settings, name))


def _fit(args, options, quiet):
    from ..budget.recommend import parse_bytes, recommend, settings_line

    given = [name for name in OF_A_STEP if getattr(args, name) is not None]
    if args.lora_rank is not None:
        raise InputError("--memory-budget does not know what adapters take; leave it or --lora-rank out")
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
