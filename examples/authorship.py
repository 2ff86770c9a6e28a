"""Who wrote this chapter? Documents of any length, classified by RecurGPT2ForSequenceClassification.

    python examples/authorship.py --books 4 --steps 60

Reads chapters of books of the bundled PG-19 sample whole, each many windows long; every second one is held out.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import pyarrow.parquet as pq
import torch
from transformers import AutoTokenizer

from recur_gpt2 import RecurGPT2ForSequenceClassification

DATA = Path(__file__).resolve().parents[1] / "data"
BATCH = 4


def chapters(books: int, tokens: int, tokenizer) -> tuple[list, list]:
    """(token ids, book) of chapters to learn from and of those held out."""
    texts = pq.read_table(DATA / "pg19-sample" / "test.parquet")["text"].to_pylist()[:books]
    learn, held_out = [], []
    for book, text in enumerate(texts):
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        pieces = [piece for piece in ids[2000:].split(tokens)[:24] if len(piece) == tokens]
        learn += [(piece, book) for piece in pieces[::2]]
        held_out += [(piece, book) for piece in pieces[1::2]]
    return learn, held_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--books", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1000, help="of a chapter (default: 1000)")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    torch.manual_seed(0)
    folder = DATA / "recur-gpt2-mini"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = RecurGPT2ForSequenceClassification.from_pretrained(folder, num_labels=args.books, dtype="float32")
    learn, held_out = chapters(args.books, args.tokens, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model.train()
    draw = random.Random(0)
    for step in range(args.steps):
        ids, labels = zip(*draw.sample(learn, BATCH), strict=True)
        loss = model(torch.stack(ids), labels=torch.tensor(labels), parallel_windows=4).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    model.eval()
    with torch.no_grad():
        right = [int(model(ids[None]).logits.argmax() == book) for ids, book in held_out]
    print(f"{sum(right)} of {len(right)} held-out chapters go to their own book; chance is {len(right) // args.books}")


if __name__ == "__main__":
    main()
