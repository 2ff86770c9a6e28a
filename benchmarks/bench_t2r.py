"""What linear attention costs in quality, and how its decoding time depends on how much was read.

    python benchmarks/bench_t2r.py quality                      # runs what docs/t2r.json does not hold yet
    python benchmarks/bench_t2r.py quality --windows 256 --data pg19-sample --only softmax "t2r all"
    python benchmarks/bench_t2r.py quality --table              # prints the tables of what is recorded
    python benchmarks/bench_t2r.py decode

`quality`: data/gpt2-mini with each attention, finetuned by `recur-gpt2 finetune` on the same windows in the same order,
for the same number of steps; with attention transfer, a quarter of them is the transfer. Each kind of attention has the
learning rate that was best for it in a trial on the validation books (docs/t2r.md). The ratio is of token perplexity
to softmax's, with a bootstrap interval over documents. The record lets it be stopped and started again.
`decode`: milliseconds a token behind 100 tokens of a document and behind all of it, in turns. The last line is JSON.
"""

import argparse
import json
import math
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import ROOT, machine, print_table
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from recur_gpt2 import RecurGPT2Config, RecurGPT2LMHeadModel
from recur_gpt2.budget.runs import Record, finetuned
from recur_gpt2.evaluation.evaluate import resample
from recur_gpt2.utils.allocator import tune_allocator

MODEL = ROOT / "data" / "gpt2-mini"
# The best of the few tried for each kind of attention on the validation books at window 256; docs/t2r.md has them.
RATES = {"softmax": "3e-5", "near": "3e-5", "linear": "3e-4"}
ADAPTED = "wikitext-103-sample"  # which gpt2-mini, a model of books, is finetuned on before anything is converted
ADAPTING = "--window 1024 --recurrence none --lanes 8 --bptt 1 --steps 120 --lr 1e-3 --no-control --rows recurrent"
ACROSS = {  # what crosses the border of windows
    "memory": "--recurrence default",
    "carried": "--recurrence none --carry-linear-state",
    "memory and carried": "--recurrence default --carry-linear-state",
}
TOKENS_PER_STEP = 8192
NEAR = 64
LANES = 8
WARM_UP, TIMED = 10, 100  # tokens
STEPS = 40
LINEAR = ("t2r all", "t2r 75%", "hedgehog all", "elu all", "rfa all")
LINEAR += tuple(f"{name}, near {NEAR}" for name in ("t2r all", "hedgehog all", "t2r 75%"))
LINEAR += (f"t2r 0 2 3 4 5, near {NEAR}",)  # layer 1 costs more than the others together (bench_conversion.py)
LINEAR += (f"t2r all, near {2 * NEAR}",)
LONG_ONLY = f"t2r all, near {4 * NEAR}"  # as much as a window of 256 is: for longer ones
BEST = f"t2r all, near {NEAR}"
TRANSFERRED = ("t2r all", "t2r 75%", "hedgehog all", "rfa all", BEST)  # elu has nothing to learn
DECODED = ("softmax", "t2r 75%", "t2r all", BEST)
TRANSFER = 4  # one step of so many is attention transfer, where there is any


def configurations(data, window):
    """{row: flags of `recur-gpt2 finetune`} for one window on one collection of texts."""
    rows = {"softmax": f"--recurrence none --lr {RATES['softmax']}"}
    for name in (*LINEAR, LONG_ONLY) if window > 4 * NEAR else LINEAR:
        flags = f"--recurrence none {linear_flags(name)}"
        rows[name] = flags
        if name in TRANSFERRED:
            rows[f"{name}, transfer"] = f"{flags} --transfer-steps"
    rows["t2r all, random weights"] = f"{rows['t2r all']} --model"
    if (data, window) == ("pg19-sample", 256):
        rows["softmax, memory"] = rows["softmax"].replace("none", "default")
        for how, flags in ACROSS.items():
            rows[f"{BEST}, {how}"] = rows[BEST].replace("--recurrence none", flags)
    return rows


def linear_flags(name):
    """ "<map> <layers>[, near <w>]" as flags."""
    attention, _, near = name.partition(", near ")
    feature_map, layers = attention.split(maxsplit=1)
    flags = f"--attention t2r --t2r-layers {layers} --feature-map {feature_map}"
    return f"{flags} --near-tokens {near} --lr {RATES['near']}" if near else f"{flags} --lr {RATES['linear']}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    quality = commands.add_parser("quality")
    add = quality.add_argument
    add("--output", type=Path, default=Path("runs/t2r"), help="folder of the runs")
    add("--record", type=Path, default=Path("docs/t2r.json"), help="what each run found")
    add("--data", nargs="+", default=["pg19-sample", "wikitext-103-sample"])
    add("--windows", type=int, nargs="+", default=[256, 1024])
    every = [*configurations("pg19-sample", 256), LONG_ONLY]
    add("--only", nargs="+", choices=every, default=every, help="rows (default: all)")
    add("--steps", type=int, default=STEPS, help=f"of 8,192 tokens, transfer included (default: {STEPS})")
    add("--split", default="test", help="documents to score (default: test)")
    add("--eval-tokens", type=int, default=73728, help="tokens of them (default: 73728)")
    add("--table", action="store_true", help="print the tables of what is recorded, and run nothing")
    quality.set_defaults(run=run_quality)
    decode = commands.add_parser("decode")
    add = decode.add_argument
    add("--tokens", type=int, default=10_000, help="length of the document (default: 10000)")
    add("--only", nargs="+", choices=DECODED, default=DECODED, help="attentions (default: all)")
    add("--batches", type=int, nargs="+", default=[1, 32], help="documents read side by side (default: 1 32)")
    add("--window", type=int, default=1024, help="T (default: 1024)")
    add("--json", metavar="FILE", help="write the last line to a file too")
    decode.set_defaults(run=run_decode)
    args = parser.parse_args()
    args.run(args)


# ---- quality ---------------------------------------------------------------------------------------------------------


def run_quality(args):
    record = Record(args.record)
    for data in args.data:
        for window in args.windows:
            found = record.at(data, str(window))
            for name in [] if args.table else filter(args.only.__contains__, configurations(data, window)):
                make = partial(run_one, args, data, window, name)
                record.once(found, name, lambda make=make: findings(make()))
            print(table(data, window, found), flush=True)
    print(json.dumps(record.found))


def run_one(args, data, window, name):
    """Finetune and evaluate -> the results."""
    flags = configurations(data, window)[name].split()
    folder = args.output / data / f"w{window}" / name.replace(" ", "-").replace(",", "").replace("%", "")
    transfer = args.steps // TRANSFER
    if flags[-1] == "--transfer-steps":
        flags += [str(transfer), "--steps", str(args.steps - transfer)]
    else:
        flags += [str(random_weights(args.output / "random-weights"))] if flags[-1] == "--model" else []
        flags += ["--steps", str(args.steps)]
    if "--model" not in flags:
        flags += ["--model", str(adapted(args) if data == ADAPTED else MODEL)]
    command = ["--window", str(window), "--data", data, "--no-control", "--rows", "recurrent"]
    command += ["--lanes", str(LANES), "--bptt", str(TOKENS_PER_STEP // window // LANES)]
    command += ["--eval-split", args.split, "--eval-tokens", str(args.eval_tokens), *flags]
    return finetuned(folder, command)


def adapted(args):
    """data/gpt2-mini, finetuned on ADAPTED with softmax attention, as a GPT-2."""
    folder, plain = args.output / "adapted", args.output / "adapted-gpt2"
    if not (plain / "model.safetensors").exists():
        finetuned(folder, ["--data", ADAPTED, "--eval-split", "validation", *ADAPTING.split()])
        trained = RecurGPT2LMHeadModel.from_pretrained(folder / "recurrent" / "model")
        model = GPT2LMHeadModel(GPT2Config.from_pretrained(MODEL)).float()
        model.load_state_dict(trained.state_dict())
        model.save_pretrained(plain)
        AutoTokenizer.from_pretrained(MODEL).save_pretrained(plain)
    return plain


def random_weights(folder):
    """data/gpt2-mini's shape and tokenizer, with weights that have learned nothing."""
    if not (folder / "model.safetensors").exists():
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config.from_pretrained(MODEL)).float().save_pretrained(folder)
        AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return folder


def findings(results):
    """What the tables need: tokens and summed loss of each document, and FLOPs."""
    (row,) = results["rows"]
    sums = [round(each, 3) for each in results["loss_by_document"]["recurrent"]]
    return {
        "nats": row["nats"],
        "mflops": row["flops_per_token"] / 1e6,
        "sums": sums,
        "counts": results["tokens_by_document"],
    }


def table(data, window, found):
    """A Markdown table of every row that is recorded."""
    lines = [
        f"{data}, window {window}",
        "",
        "| attention | token perplexity | ratio to softmax | 95% interval | MFLOPs |",
    ]
    lines.append("|---|---|---|---|---|")
    for name in filter(found.get, configurations(data, window)):
        row, base = found[name], found.get("softmax")
        cells = [name, f"{math.exp(row['nats']):.2f}", "", "", f"{row['mflops']:.2f}"]
        if base and name != "softmax":
            low, high = interval(row, base)
            cells[2:4] = [f"{math.exp(row['nats'] - base['nats']):.3f}", f"{low:.3f} to {high:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def interval(row, base):
    """95% of the ratio of perplexities, resampling documents."""
    difference, counts = np.array(row["sums"]) - np.array(base["sums"]), np.array(row["counts"])
    draws = resample(len(counts))
    return np.exp(np.quantile(difference[draws].sum(axis=1) / counts[draws].sum(axis=1), [0.025, 0.975]))


# ---- decode ----------------------------------------------------------------------------------------------------------


def run_decode(args):
    tune_allocator()
    rows = []
    near = {"linear_layers": "all", "near_tokens": min(NEAR, args.window)}
    fields = ({}, {"linear_layers": "75%"}, {"linear_layers": "all"}, near)
    for name, options in zip(DECODED, fields, strict=True):
        if name not in args.only:
            continue
        model = untrained(window=args.window, recurrence="none", **options).eval().fuse_feature_maps()
        for batch in args.batches:
            rows.append({"attention": name, "batch": batch} | decode(model, batch, args))
            print(rows[-1], file=sys.stderr, flush=True)
    head = ["attention", "batch", "ms a token at 100", f"at {args.tokens:,}", "ratio", "state, KiB"]
    cells = [
        [r["attention"], str(r["batch"]), f"{r['early']:.2f}", f"{r['late']:.2f}", f"{r['late'] / r['early']:.3f}"]
        for r in rows
    ]
    print_table(head, [[*cell, f"{row['state_bytes'] / 1024:,.0f}"] for cell, row in zip(cells, rows, strict=True)])
    line = json.dumps({"benchmark": "t2r decode", "machine": machine("cpu"), "rows": rows})
    if args.json:
        Path(args.json).write_text(line + "\n")
    print(line)


def untrained(**options):
    """data/gpt2-mini's shape; how long a token takes does not depend on the weights."""
    fields = GPT2Config.from_pretrained(MODEL).to_dict()
    fields.pop("model_type")
    torch.manual_seed(0)
    return RecurGPT2LMHeadModel(RecurGPT2Config(**fields | options)).float()


@torch.no_grad()
def decode(model, batch, args):
    """Median milliseconds a token behind 100 tokens and behind all, in turns; the most that a row's state holds."""
    ids = torch.randint(model.config.vocab_size, (batch, args.tokens), generator=torch.Generator().manual_seed(0))
    states = {"early": read(model, ids[:, :100]), "late": read(model, ids)}
    times = {name: [] for name in states}
    for token in ids[:, : WARM_UP + TIMED].split(1, dim=1):
        for name, state in states.items():
            began = time.perf_counter()
            states[name] = model(token, state=state).state
            times[name].append(1e3 * (time.perf_counter() - began))
    held = read(model, ids[:, : args.window - 1]).nbytes // batch
    return {name: statistics.median(each[WARM_UP:]) for name, each in times.items()} | {"state_bytes": held}


def read(model, ids):
    """The state behind some tokens."""
    state = None
    for piece in ids.split(model.config.window, dim=1):
        state = model.transformer(piece, state=state).state
    return state


if __name__ == "__main__":
    main()
