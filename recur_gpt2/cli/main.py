"""The command line, `recur-gpt2 COMMAND`.

One file a command, with `add_arguments(parser)` and `run(args)`, which imports what is large when it is called. Bad
input ends in one sentence and exit status 2, Ctrl-C in status 130, output that nobody reads any more in status 141.
"""

from __future__ import annotations

import argparse

from . import analyze, convert, embed, evaluate, finetune, generate, recommend, search, sweep
from .process import guarded

COMMANDS = {
    "finetune": (finetune, "finetune a GPT-2 with recurrence on documents and compare it"),
    "evaluate": (evaluate, "score documents with a model, by any protocol"),
    "analyze": (analyze, "a page that shows what the memory carries of a text"),
    "convert": (convert, "give layers of a model linear attention (T2R)"),
    "embed": (embed, "write a vector for each document to a Parquet file"),
    "search": (search, "find the documents that are nearest to a text"),
    "recommend": (recommend, "settings that fit a memory budget, and the command"),
    "generate": (generate, "write on after a text of any length"),
    "sweep": (sweep, "measure perplexity against memory and computation"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command with these arguments, or with the process's; returns its exit status."""
    parser = argparse.ArgumentParser(prog="recur-gpt2", description="GPT-2 for documents of any length.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, purpose) in COMMANDS.items():
        command = commands.add_parser(name, help=purpose)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    return guarded(lambda: args.run(args))
