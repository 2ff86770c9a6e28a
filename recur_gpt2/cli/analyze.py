"""`recur-gpt2 analyze`: one page that shows what the memory carried of a document."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..data.bundle import BUNDLED_RECURRENT
from ..errors import check_range
from ..utils.files import atomic_write_text, check_can_write, read_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("text", type=Path, help="a UTF-8 file of more than two windows")
    add("-o", "--output", type=Path, required=True, help="HTML file to write: it needs no network and no other file")
    add("--model", default=str(BUNDLED_RECURRENT), help="our model: folder or hub id (default: data/recur-gpt2-mini)")
    add("--windows", type=int, default=6, help="to show closely, spread evenly over the text (default: 6)")
    add("--tokens", type=int, help="of the text to read, from its start (default: all)")
    add("--precision", default="auto", choices=["auto", "float32", "bfloat16"], help="to read the whole text in")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="default: a GPU if there is one")


def run(args: argparse.Namespace) -> None:
    """Analyze a text and write the page."""
    check_can_write(args.output)
    check_range(1, windows=args.windows, tokens=args.tokens)
    text = read_text(args.text)
    import numpy as np

    from ..evaluation.analysis import Shown, analyze
    from ..evaluation.analysis_page import analysis_page
    from ..models.hub import load_tokenizer
    from ..models.loading import load_any
    from ..training.precision import autocast_dtype
    from ..utils.device import checked_device

    model = load_any(args.model).to(checked_device(args.device))
    tokenizer = load_tokenizer(args.model)
    tokens = np.array(tokenizer(text, verbose=False)["input_ids"])[: args.tokens]
    dtype = autocast_dtype(model, args.precision, training=False)
    found = analyze(model, tokenizer, tokens, Shown(windows=args.windows), dtype=dtype, progress=True)
    atomic_write_text(args.output, analysis_page(found, title=args.text.name))
    with_memory, without = found["nats"]["recurrent"], found["nats"]["zeroed"]
    print(f"{len(tokens):,} tokens: {with_memory:.3f} nats a token with memory, {without:.3f} without", file=sys.stderr)
    print(f"to look at it: open {args.output} in a browser", file=sys.stderr)
