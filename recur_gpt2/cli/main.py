"""The command line: `recur-gpt2 finetune | evaluate | convert | embed | search | generate | recommend | sweep`.

Parses, calls, prints. Bad input ends in one sentence and exit status 2, Ctrl-C in status 130, output that nobody reads
any more in status 141. Where several processes were started, the main one prints.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from ..data.bundle import BATCH_TOKENS, BUNDLED_MODEL, BUNDLED_RECURRENT, POOLING, POOLINGS
from ..errors import InputError
from ..utils.allocator import tune_allocator
from .budget import add_recommend_arguments, add_sweep_arguments, run_recommend, run_sweep_command, settle
from .generate import add_generate_arguments, run_generate

BROKEN_PIPE = 141  # exit status, as of a program that the system ends for it
ATTENTION_DEFAULTS = {"feature_map": "t2r", "feature_size": 32, "near_tokens": 0, "carry_linear_state": False}
T2R_DEFAULTS = {"t2r_layers": ["all"]} | ATTENTION_DEFAULTS


def main(argv: list[str] | None = None) -> int:
    """Run a command with these arguments, or with the process's; returns its exit status."""
    parser = argparse.ArgumentParser(prog="recur-gpt2", description="GPT-2 for documents of any length.")
    commands = parser.add_subparsers(dest="command", required=True)
    each = (
        (
            "finetune",
            "finetune a GPT-2 with recurrence on documents and compare it",
            _add_finetune_arguments,
            run_finetune,
        ),
        ("evaluate", "score documents with a model, by any protocol", _add_evaluate_arguments, run_evaluate),
        ("convert", "give layers of a model linear attention (T2R)", _add_convert_arguments, run_convert),
        ("embed", "write a vector for each document to a Parquet file", _add_embed_arguments, run_embed),
        ("search", "find the documents that are nearest to a text", _add_search_arguments, run_search),
        (
            "recommend",
            "settings that fit a memory budget, and the command",
            partial(add_recommend_arguments, model=str(BUNDLED_MODEL)),
            run_recommend,
        ),
        (
            "generate",
            "write on after a text of any length",
            partial(add_generate_arguments, model=str(BUNDLED_RECURRENT)),
            run_generate,
        ),
        (
            "sweep",
            "measure perplexity against memory and computation",
            partial(add_sweep_arguments, model=str(BUNDLED_MODEL)),
            run_sweep_command,
        ),
    )
    for name, purpose, add_arguments, run in each:
        command = commands.add_parser(name, help=purpose)
        add_arguments(command)
        command.set_defaults(run=run)
    args = parser.parse_args(argv)
    return guarded(lambda: args.run(args))


def guarded(run: Callable[[], None]) -> int:
    """Run a command; returns its exit status."""
    tune_allocator()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading weights; ours stay
    from ..training.distributed import ElsewhereError, leave

    try:
        run()
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        return BROKEN_PIPE
    except ElsewhereError:
        return 2
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        if _is_main():
            print(f"interrupted: {interrupt}" if str(interrupt) else "interrupted", file=sys.stderr)
        return 130
    finally:
        leave()
    return 0


def _discard_output():
    """Nobody reads what is printed (`| head`): what is still held back must not fail when the process ends."""
    with suppress(OSError, ValueError):  # where stdout is no file of the system
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_main():
    """Whether this is the main one of the processes that were started together, if there are several."""
    return os.environ.get("RANK", "0") == "0"


def _add_finetune_arguments(parser):
    add_experiment_arguments(parser, data="pg19-sample")


def add_experiment_arguments(parser: argparse.ArgumentParser, *, data: str) -> None:
    """The flags of a comparison, each explained in a line."""
    add = parser.add_argument
    add("--window", type=int, help="T, tokens a window (default: 256)")
    add("--memory-budget", metavar="2GiB", help="choose window and lanes so that finetuning fits in this")
    add("--model", default=str(BUNDLED_MODEL), help="GPT-2 checkpoint: hub id or folder (default: data/gpt2-mini)")
    add(
        "--data", default=data, help=f"pg19-sample, wikitext-103-sample, pg19, wikitext-103 or a path (default: {data})"
    )
    add("--recurrence", default="default", help="default, yoshida2020 or none")
    add("--bptt", type=int, help="K, windows that gradients reach back over (default: 4)")
    add("--steps", type=int, default=120, help="optimizer steps (default: 120)")
    add("--lanes", type=int, help="documents read side by side (default: 8); with a budget, at most")
    add("--lr", type=float, default=3e-5, help="peak learning rate of the pretrained weights (default: 3e-5)")
    add(
        "--recurrence-lr",
        type=float,
        default=3e-3,
        help="peak learning rate of what is new: recurrence and feature maps (default: 3e-3)",
    )
    add("--accumulate", type=int, help="segments per optimizer step (default: 1)")
    add("--checkpointing", action="store_true", help="recompute windows in the backward pass: least memory")
    add("--parallel-windows", type=int, help="windows of a lane computed at once (default: all K, or 1 to save memory)")
    add("--precision", default="auto", choices=["auto", "float32", "bfloat16"], help="auto measures which is faster")
    add(
        "--eval-split",
        default="test",
        choices=["train", "validation", "test"],
        help="documents to score (default: test)",
    )
    add("--eval-tokens", type=int, default=147456, help="tokens to score, 0 for all (default: 147456)")
    add("--save-every", type=int, default=100, help="steps between checkpoints (default: 100)")
    add("--seed", type=int, default=0, help="of the documents' order (default: 0)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="default: a GPU if there is one")
    add("--resume", action="store_true", help="go on where an earlier run in --output-dir stopped")
    add("--output-dir", type=Path, help="default: runs/NAME-wWINDOW")
    add("--rows", nargs="*", help="rows to score; none after the flag: finetune only (default: all)")
    add("--no-control", action="store_true", help="leave out finetuning without recurrence")
    for slots in ("sink", "last", "pooled"):
        add(f"--{slots}-slots", type=int, help=f"{slots} slots of memory a layer (default: the preset's)")
    add("--insert-layers", type=int, nargs="+", help="layers that attend to memory (default: the preset's)")
    add("--attention", default="softmax", choices=["softmax", "t2r"], help="t2r: linear attention (default: softmax)")
    _add_t2r_arguments(parser, "--t2r-layers")
    add("--transfer-steps", type=int, default=0, help="steps before finetuning that teach feature maps (default: 0)")
    add("--transfer-lr", type=float, default=1e-2, help="peak learning rate of those steps (default: 1e-2)")
    add("--new-first-steps", type=int, default=0, help="of --steps, train what is new alone (default: 0)")


def _add_t2r_arguments(parser, layers):
    add = parser.add_argument
    add(layers, nargs="+", default=T2R_DEFAULTS["t2r_layers"], help="all, 75%% or numbers of layers (default: all)")
    add("--feature-map", default=T2R_DEFAULTS["feature_map"], help="t2r, hedgehog, elu or rfa (default: t2r)")
    add("--feature-size", type=int, default=T2R_DEFAULTS["feature_size"], help="k, features of a head (default: 32)")
    add("--near-tokens", type=int, default=0, help="w, nearest places that keep softmax in them (default: 0)")
    add("--carry-linear-state", action="store_true", help="carry the sums (S, z) from window to window")


def layer_names(words: list[str]) -> str | list[int]:
    """What --t2r-layers and --layers say: the name of a set of layers, or their numbers."""
    try:
        return [int(word) for word in words]
    except ValueError:
        return " ".join(words)


def run_finetune(args: argparse.Namespace, name: str | None = None) -> None:
    """Run the comparison and print its table."""
    from ..evaluation.comparison import run_experiment
    from ..evaluation.report import finding, format_table
    from ..training.distributed import Processes

    options = {key: getattr(args, key) for key in ("sink_slots", "last_slots", "pooled_slots", "insert_layers")}
    options = {key: value for key, value in options.items() if value is not None}
    given = [key for key, default in T2R_DEFAULTS.items() if getattr(args, key) != default]
    name = name or Path(args.data).stem
    processes = Processes(args.device)
    with processes.agreeing():
        if args.attention == "t2r":
            options["linear_layers"] = layer_names(args.t2r_layers)
            options |= {key: getattr(args, key) for key in ATTENTION_DEFAULTS}
        elif given:
            raise InputError(f"--{given[0].replace('_', '-')} is for linear attention; add --attention t2r")
        settle(args, options, quiet=not processes.is_main)
        experiment = _experiment(args, options, name)
    results = run_experiment(experiment)
    if results is None:
        return  # the main process has them
    print(format_table(results["rows"]))
    print()
    print(finding(results["rows"]))
    print(f"Report, plots and models: {results['settings']['output_dir']}")


def _experiment(args, options, name):
    from ..evaluation.comparison import ExperimentArguments
    from ..training.arguments import TrainingArguments

    training = {key: getattr(args, key) for key in ("steps", "lanes", "bptt", "lr", "recurrence_lr", "accumulate")}
    training |= {key: getattr(args, key) for key in ("checkpointing", "parallel_windows", "precision", "seed")}
    training |= {key: getattr(args, key) for key in ("transfer_steps", "transfer_lr", "new_first_steps")}
    return ExperimentArguments(
        model=args.model,
        data=args.data,
        output_dir=args.output_dir or Path("runs") / f"{name}-w{args.window}",
        window=args.window,
        recurrence=args.recurrence,
        model_options=options,
        training=TrainingArguments(**training, save_every=args.save_every),
        eval_split=args.eval_split,
        eval_tokens=args.eval_tokens or None,
        control=not args.no_control,
        rows=args.rows,
        device=args.device,
        resume=args.resume,
    )


def _add_evaluate_arguments(parser):
    add = parser.add_argument
    add("--model", default=str(BUNDLED_MODEL), help="GPT-2 or recur_gpt2 model: hub id or folder")
    add("--data", default="pg19-sample", help="documents, as for finetune (default: pg19-sample)")
    add(
        "--split",
        default="all",
        choices=["train", "validation", "test", "all"],
        help="all: the test split; of files or a folder without splits of their own, everything (default)",
    )
    add("--window", type=int, help="T; default: the model's own, or 256 for a GPT-2")
    add("--recurrence", default="none", help="for a GPT-2: score it with this recurrence, untrained (default: none)")
    add(
        "--protocols",
        nargs="+",
        help="disjoint, overlap, recurrent, recurrent+overlap, zeroed, shuffled (default: all)",
    )
    add("--eval-tokens", type=int, default=0, help="tokens to score, 0 for all (default)")
    add("--lanes", type=int, default=8, help="documents read side by side (default: 8)")
    add("--parallel-windows", type=int, default=4, help="windows of a document computed at once (default: 4)")
    add("--precision", default="auto", choices=["auto", "float32", "bfloat16"], help="auto measures which is faster")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="default: a GPU if there is one")
    add("--json", type=Path, help="write the rows to this file too, with the loss of each document")


def run_evaluate(args: argparse.Namespace) -> None:
    """Score documents and print a table."""
    if not _is_main():
        return  # one process evaluates
    import json

    from ..evaluation.report import format_table
    from ..evaluation.scoring import evaluate_model
    from ..utils.files import atomic_write_text, check_can_write

    if args.json:
        check_can_write(args.json)
    scored = evaluate_model(
        args.model,
        args.data,
        split=args.split,
        window=args.window,
        recurrence=args.recurrence,
        protocols=args.protocols,
        eval_tokens=args.eval_tokens or None,
        lanes=args.lanes,
        parallel_windows=args.parallel_windows,
        precision=args.precision,
        device=args.device,
    )
    if args.json:
        atomic_write_text(args.json, json.dumps(scored, indent=1) + "\n")
    print(scored["split_rule"] or f"{len(scored['tokens_by_document'])} documents of {args.data}", file=sys.stderr)
    print(format_table(scored["rows"]))


def _add_convert_arguments(parser):
    add = parser.add_argument
    add("--model", default=str(BUNDLED_MODEL), help="GPT-2 or recur_gpt2 model: hub id or folder")
    add("--output", type=Path, required=True, help="folder to write the converted model to")
    add("--window", type=int, help="T; default: the model's own, or 256 for a GPT-2")
    add("--recurrence", default="none", help="for a GPT-2: give it this recurrence too (default: none)")
    _add_t2r_arguments(parser, "--layers")


def run_convert(args: argparse.Namespace) -> None:
    """Convert a model and save it."""
    from ..models.block import is_feature_map
    from ..models.conversion import convert_to_t2r
    from ..models.hub import load_tokenizer
    from ..models.loading import load_any, save_model
    from ..utils.files import check_can_write

    if args.output.exists():
        raise InputError(f"{args.output} exists already; give another --output")
    check_can_write(args.output, folder=True)
    tokenizer = load_tokenizer(args.model)
    model = load_any(args.model, args.window, args.recurrence)
    options = {key: getattr(args, key) for key in ATTENTION_DEFAULTS}
    convert_to_t2r(model, layer_names(args.layers), **options)
    save_model(model, tokenizer, args.output)
    print(f"layers {model.config.linear_layers} have linear attention now; finetune it:")
    transfer = " --transfer-steps 60" if any(is_feature_map(name) for name, _ in model.named_parameters()) else ""
    print(f"recur-gpt2 finetune --model {args.output} --window {model.config.window}{transfer}")


def _add_embed_arguments(parser):
    add = parser.add_argument
    add("inputs", nargs="+", help="folders, globs, .txt, .jsonl or .parquet files, or Hugging Face datasets")
    add("-o", "--output", type=Path, required=True, help="Parquet file to write; goes on where a run was stopped")
    add("--model", default=str(BUNDLED_RECURRENT), help="our model or a GPT-2: folder or hub id")
    add("--window", type=int, help="T; default: the model's own, or 256 for a GPT-2")
    add("--pooling", default=POOLING, choices=POOLINGS, help=f"tokens' vectors to the document's (default: {POOLING})")
    add("--layer", type=int, help="whose output is pooled; -1 is the last (default: the one two thirds of the way up)")
    add("--normalize", action="store_true", help="scale vectors to unit length")
    add("--dtype", default="float32", choices=["float32", "float16"], help="of the numbers written (default: float32)")
    add("--precision", default="float32", choices=["float32", "bfloat16"], help="to compute in (default: float32)")
    add("--batch-tokens", type=int, default=BATCH_TOKENS, help=f"tokens read at once (default: {BATCH_TOKENS})")
    add("--shard", type=_shard, default=(1, 1), metavar="I/N", help="the I-th of N shares of the documents, 1/N to N/N")
    add("--split", default="train", help="of datasets (default: train)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="default: a GPU if there is one")


def _shard(text):
    try:
        index, shards = map(int, text.split("/"))
    except ValueError:
        index, shards = 0, 0
    if not 1 <= index <= shards:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; give 1/4 for the first of four, 4/4 for the last")
    return index, shards


def run_embed(args: argparse.Namespace) -> None:
    """Embed documents into a Parquet file."""
    from ..data.sources import find_sources
    from ..embedding.embedder import DocumentEmbedder, checked_layer
    from ..embedding.parquet import embed_texts
    from ..utils.files import check_can_write

    check_can_write(args.output)
    sources = find_sources(args.inputs, args.split)
    embedder = DocumentEmbedder.from_pretrained(args.model, args.window, args.device, args.precision)
    settings = {key: getattr(args, key) for key in ("model", "pooling", "normalize", "precision")}
    settings["layer"] = checked_layer(embedder.model, args.layer)
    embedded, total = embed_texts(
        embedder,
        sources,
        args.output,
        settings=settings,
        batch_tokens=args.batch_tokens,
        dtype=args.dtype,
        shard=args.shard,
    )
    print(f"{embedded} documents embedded, {total} in {args.output}; to look at them:")
    print(f"recur-gpt2 search {args.output} --query-file some.txt")


def _add_search_arguments(parser):
    add = parser.add_argument
    add("files", nargs="+", type=Path, help="what recur-gpt2 embed wrote")
    add("--query-file", type=Path, required=True, help="the text to look for, a whole document")
    add("-k", type=int, default=10, help="documents to show (default: 10)")
    add("--model", help="default: the one that the vectors were made with, where it was then")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="default: a GPU if there is one")


def run_search(args: argparse.Namespace) -> None:
    """Print the documents that are nearest to a text."""
    from ..embedding.search import nearest

    found = nearest(args.files, args.query_file, args.k, args.model, args.device)
    print(f"{'rank':>4}  {'cosine':>7}  {'characters':>10}  id")
    for rank, row in enumerate(found, start=1):
        print(f"{rank:>4}  {row.cosine:>7.4f}  {row.characters:>10,}  {row.id}")
