"""What memory remembers: pairs recalled windows later, and rare words that a document has used before.

    python benchmarks/bench_memory.py recall                        # by kind of memory, small models from scratch
    python benchmarks/bench_memory.py words --run runs/pg19-w256    # of a finished comparison

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from recall_task import RecallTask, recall_model, recalled

from recur_gpt2.data.corpora import load_corpus
from recur_gpt2.evaluation.evaluate import evaluate
from recur_gpt2.evaluation.rare_words import rare_word_rows, word_counts
from recur_gpt2.models.hub import load_tokenizer
from recur_gpt2.models.loading import load_any
from recur_gpt2.training.arguments import TrainingArguments
from recur_gpt2.training.trainer import Trainer
from recur_gpt2.utils.allocator import tune_allocator

WINDOW = 32
POINTERS = 1024  # more than the 16 windows that are asked for
NONE = {"sink_slots": 1, "last_slots": 0, "pointer_slots": 0}
KINDS = {
    "default": {"pointer_slots": POINTERS},
    "pointers alone": {"recurrence": "none", "pointer_slots": POINTERS},
    "last positions": NONE | {"last_slots": 16},
    "last positions, whole window": NONE | {"last_slots": WINDOW},
    "pooled slots": NONE | {"pooled_slots": 16},
    "yoshida2020": {"recurrence": "yoshida2020"},
    "yoshida2020, 8 slots": {"recurrence": "yoshida2020", "pooled_slots": 8, "insert_layers": [0, 1]},
    "linear state": {"recurrence": "none", "linear_layers": "all", "carry_linear_state": True},
}
LONGER = 1024


def recall(args) -> list[dict]:
    """Train each kind of memory from the same random weights on the same documents; what it recalls of new ones."""
    rows, task = [], RecallTask(WINDOW)
    for name, memory in KINDS.items():
        if args.kinds and name not in args.kinds:
            continue
        model = recall_model(WINDOW, **memory)
        settings = {"steps": args.steps, "lanes": 16, "bptt": 8, "lr": 2e-3, "recurrence_lr": 5e-3, "seed": args.seed}
        settings |= {"precision": "float32", "save_every": args.steps}
        with tempfile.TemporaryDirectory() as folder:
            Trainer(model, task, TrainingArguments(**settings), Path(folder)).run(description=name)
        rows.append({"memory": name} | {str(d): share for d, share in recalled(model, task, 64).items()})
        print("  ".join(f"{each:.2f}" if isinstance(each, float) else f"{each:30}" for each in rows[-1].values()))
    return rows


def words(args) -> list[dict]:
    """Rare words of the test books, for the models of a comparison and plain GPT-2 in windows of all its positions."""
    folder = Path(args.run)
    settings = json.loads((folder / "settings.json").read_text())
    tokenizer = load_tokenizer(settings["model"])
    documents = [ids[: args.tokens] for ids in load_corpus(settings["data"], "test", tokenizer).documents()]
    recurrent, disjoint = (load_any(str(folder / name / "model")) for name in ("recurrent", "disjoint"))
    plain = load_any(args.plain or settings["model"], None if args.plain else LONGER)
    models = {
        "disjoint": (disjoint, "disjoint"),
        "recurrent": (recurrent, "recurrent"),
        "zeroed": (recurrent, "zeroed"),
    }
    models[f"windows of {LONGER:,}"] = plain, "disjoint"
    losses = {
        name: evaluate(model, documents, tokenizer, protocol=protocol, dtype=torch.bfloat16, progress=True).losses
        for name, (model, protocol) in models.items()
    }
    counts = word_counts(load_corpus(settings["data"], "train", tokenizer).documents(), tokenizer)
    rows = rare_word_rows(documents, losses, tokenizer, counts, window=recurrent.config.window, longer=LONGER)
    for row in rows:
        print("  ".join(f"{each:8.3f}" if isinstance(each, float) else f"{each!s:>12}" for each in row.values()))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("recall")
    command.add_argument("--steps", type=int, default=600)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--kinds", nargs="+", help=f"some of {', '.join(KINDS)} (default: all)")
    command.set_defaults(measure=recall)
    command = commands.add_parser("words")
    command.add_argument("--run", required=True, help="folder of a comparison")
    command.add_argument("--plain", help=f"a model finetuned in windows of {LONGER:,} (default: the base)")
    command.add_argument("--tokens", type=int, default=32768, help="of each document")
    command.set_defaults(measure=words)
    args = parser.parse_args()
    tune_allocator()
    settings = {name: value for name, value in vars(args).items() if name != "measure"}
    print(json.dumps({"settings": settings, "rows": args.measure(args)}))


if __name__ == "__main__":
    main()
