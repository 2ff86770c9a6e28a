"""`recur-gpt2 search`: the documents that are nearest to a text."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("files", nargs="+", type=Path, help="what recur-gpt2 embed wrote")
    add("--query-file", type=Path, required=True, help="the text to look for, a whole document")
    add("-k", type=int, default=10, help="documents to show (default: 10)")
    add("--model", help="default: the one that the vectors were made with, where it was then")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="default: a GPU if there is one")


def run(args: argparse.Namespace) -> None:
    """Print the documents that are nearest to a text."""
    from ..embedding.search import nearest

    found = nearest(args.files, args.query_file, args.k, args.model, args.device)
    print(f"{'rank':>4}  {'cosine':>7}  {'characters':>10}  id")
    for rank, row in enumerate(found, start=1):
        print(f"{rank:>4}  {row.cosine:>7.4f}  {row.characters:>10,}  {row.id}")
