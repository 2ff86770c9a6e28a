"""`recur-gpt2 embed`: a vector for each document, in a Parquet file."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..data.bundle import BATCH_TOKENS, BUNDLED_RECURRENT, POOLING, POOLINGS


def add_arguments(parser: argparse.ArgumentParser) -> None:
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


def run(args: argparse.Namespace) -> None:
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
