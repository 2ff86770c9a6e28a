"""Make data/recur-gpt2-mini: the bundled GPT-2 with the default recurrence, finetuned long on books typeset as PG-19's.

    python scripts/make_recur_gpt2_mini.py --books FOLDER --work-dir runs/recur-gpt2-mini

FOLDER holds the files that data/gpt2-mini/training_books.csv names; those whose names begin with `pg` and a number
come from Project Gutenberg as PG-19's do, line breaks included. The finetuning itself is one `recur-gpt2 finetune`,
which is printed; killed and started again, this script goes on with it. The result, `--work-dir/model`, is a Hugging
Face folder in float16 with a card of what was measured.
"""

import argparse
import csv
import re
from pathlib import Path

import torch
from transformers import AutoTokenizer

from recur_gpt2 import RecurGPT2LMHeadModel
from recur_gpt2.budget.runs import finetuned
from recur_gpt2.evaluation.arguments import EvaluationArguments
from recur_gpt2.evaluation.scoring import evaluate_model
from recur_gpt2.utils.allocator import tune_allocator
from recur_gpt2.utils.files import atomic_write_text

DATA = Path(__file__).resolve().parents[1] / "data"
FLAGS = "--window 256 --steps 1600 --lr 1e-4 --eval-split validation --eval-tokens 8192 --rows recurrent --no-control"
SPLITS = ("validation", "test")
PROTOCOLS = {"data/gpt2-mini": ["disjoint", "overlap"]}
PROTOCOLS["data/recur-gpt2-mini"] = ["recurrent", "recurrent+overlap", "zeroed", "shuffled"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--books", type=Path, required=True, help="folder of the books that gpt2-mini was trained on")
    parser.add_argument("--work-dir", type=Path, required=True, help="data, run and result")
    args = parser.parse_args()
    tune_allocator()
    names = gather(args.books, args.work_dir / "data")
    results = finetuned(args.work_dir / "run", ["--data", str(args.work_dir / "data"), *FLAGS.split()])
    model = pack(args.work_dir)
    write_card(args.work_dir, model, names, results["training"]["recurrent"])


def gather(books, folder):
    """A folder as `--data` takes it: the books to train on, beside the sample's validation and test books."""
    with (DATA / "gpt2-mini" / "training_books.csv").open(encoding="utf-8") as file:
        names = [row["file"] for row in csv.DictReader(file)]
    names = [name for name in names if re.match(r"pg\d+_", Path(name).name)]
    (folder / "train").mkdir(parents=True, exist_ok=True)
    for name in names:
        link(books / name, folder / "train" / Path(name).name)
    for split in SPLITS:
        link(DATA / "pg19-sample" / f"{split}.parquet", folder / f"{split}.parquet")
    return names


def link(source, target):
    if not target.exists():
        target.symlink_to(source.resolve(strict=True))


def pack(work_dir):
    """The finetuned model in 16 bit, with its tokenizer."""
    trained = work_dir / "run" / "recurrent" / "model"
    model = RecurGPT2LMHeadModel.from_pretrained(trained, dtype=torch.float16)
    model.save_pretrained(work_dir / "model", tokenizer=AutoTokenizer.from_pretrained(trained))
    return model


def write_card(work_dir, model, names, training):
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines = [
        "# recur-gpt2-mini",
        "",
        f"`data/gpt2-mini` with the default recurrence, window {config.window}, {config.sink_slots} sink and "
        f"{config.last_slots} last positions a layer, {parameters / 1e6:.1f}M parameters,",
        f"finetuned for {len(training):,} steps, {training[-1]['tokens'] / 1e6:.1f}M tokens, on {len(names)} of the "
        "books that gpt2-mini was pretrained on: those typeset as PG-19's are.",
        "Examples, embeddings and generation start from it. None of its training books is in the bundled samples.",
        "",
        "Made by `scripts/make_recur_gpt2_mini.py`, which runs",
        "",
        f"    recur-gpt2 finetune --data FOLDER {FLAGS}",
        "",
        "## Held-out loss",
        "",
        "`recur-gpt2 evaluate --window 256 --eval-tokens 147456` on `data/pg19-sample`. gpt2-mini has not had this",
        "finetuning: the rows with the state removed and with another document's say what the recurrence is worth.",
        "",
        "| model | protocol | split | nats per token | 95% interval | token perplexity | bits per byte |",
        "|---|---|---|---|---|---|---|",
    ]
    folders = {"data/gpt2-mini": DATA / "gpt2-mini", "data/recur-gpt2-mini": work_dir / "model"}
    for name, protocols in PROTOCOLS.items():
        for split in SPLITS:
            scored = {"split": split, "window": config.window, "protocols": protocols, "eval_tokens": 147456}
            rows = evaluate_model(EvaluationArguments(str(folders[name]), "pg19-sample", **scored))["rows"]
            for protocol, row in zip(protocols, rows, strict=True):
                low, high = row["nats_interval"]
                lines.append(
                    f"| {name} | {protocol} | {split} | {row['nats']:.4f} | {low:.4f} to {high:.4f} "
                    f"| {row['token_ppl']:.2f} | {row['bits_per_byte']:.4f} |"
                )
    lines += ["", "## Books", "", *(f"- {name}" for name in names)]
    atomic_write_text(work_dir / "model" / "README.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
