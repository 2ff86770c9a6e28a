"""How near to softmax a converted model starts: perplexity on the validation books before any finetuning.

    python benchmarks/bench_conversion.py

data/gpt2-mini, all layers converted, with each feature map as it is made, fitted without data as conversion does it,
and fitted on text of the training books; then what each layer alone costs, fitted without data. The last line is JSON.
"""

import argparse
import json
import math
import sys

import numpy as np
import torch
from common import ROOT, machine, print_table
from transformers import AutoTokenizer

from recur_gpt2 import RecurGPT2LMHeadModel
from recur_gpt2.data.corpora import load_corpus
from recur_gpt2.evaluation.evaluate import evaluate
from recur_gpt2.models.calibration import SAMPLES
from recur_gpt2.models.feature_map_fitting import fit_feature_maps
from recur_gpt2.ops.feature_maps import FEATURE_MAPS
from recur_gpt2.utils.allocator import tune_allocator

MODEL = ROOT / "data" / "gpt2-mini"
NEAR = 64


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--window", type=int, default=256, help="T (default: 256)")
    add("--eval-tokens", type=int, default=24576, help="tokens to score, from the books' starts (default: 24576)")
    args = parser.parse_args()
    tune_allocator()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    books = list(load_corpus("pg19-sample", "validation", tokenizer).documents())
    score = Score([book[: args.eval_tokens // len(books)] for book in books], tokenizer)
    text = stretches(load_corpus("pg19-sample", "train", tokenizer).documents(), args.window)
    found, alone = {"softmax": [score(converted(args.window))]}, {}
    for name, options in rows().items():
        model = converted(args.window, **options)
        alone[name] = [each / found["softmax"][0] for each in one_by_one(model, score)]
        found[name] = starts(model, text, score)
        print(name, found[name], alone[name], file=sys.stderr, flush=True)
    cells = [[name, *(f"{each:.1f}" for each in row), *[""] * (3 - len(row))] for name, row in found.items()]
    print_table(["attention", "as made", "fitted, no data", "fitted on text"], cells)
    settings = {"window": args.window, "eval_tokens": args.eval_tokens}
    layers = [f"layer {layer}" for layer in range(len(model.transformer.h))]
    print_table(["alone", *layers], [[name, *(f"{each:.3f}" for each in row)] for name, row in alone.items()])
    result = {"benchmark": "conversion", "settings": settings, "machine": machine("cpu")}
    print(json.dumps(result | {"perplexity": found, "ratio_of_one_layer": alone}))


def rows():
    """{name: fields of RecurGPT2Config}: each map alone and, of two, with near places."""
    alone = {name: {"linear_layers": "all", "feature_map": name} for name in FEATURE_MAPS}
    return alone | {f"{name}, near {NEAR}": alone[name] | {"near_tokens": NEAR} for name in ("t2r", "hedgehog")}


def one_by_one(model, score):
    """Perplexity with each layer alone converted."""
    made = [(block.feature_map, block.far_gate) for block in model.transformer.h]
    found = []
    for only in range(len(made)):
        for layer, block in enumerate(model.transformer.h):
            block.feature_map, block.far_gate = made[layer] if layer == only else (None, None)
        found.append(score(model))
    for block, parts in zip(model.transformer.h, made, strict=True):
        block.feature_map, block.far_gate = parts
    return found


def starts(model, text, score):
    """Perplexity as made, fitted without data, fitted on text."""
    fitted = score(model)
    for block in model.transformer.h:
        block.feature_map.reset_parameters()
        if block.far_gate is not None:
            block.far_gate.reset_parameters()
    as_made = score(model)
    fit_feature_maps(model.transformer, text)
    return [as_made, fitted, score(model)]


def converted(window, **options):
    return RecurGPT2LMHeadModel.from_gpt2(str(MODEL), window=window, recurrence="none", **options)


def stretches(documents, length):
    """(samples, length) ids, from the middle of as many books as there are, in turns."""
    documents = [document for document in documents if len(document) > 4 * length]
    each = -(-SAMPLES // len(documents))
    middles = [document[len(document) // 2 :][: each * length].reshape(each, length) for document in documents]
    return torch.from_numpy(np.concatenate(middles)[:SAMPLES]).long()


class Score:
    """Perplexity of a model on some documents."""

    def __init__(self, documents, tokenizer):
        self.documents, self.tokenizer = documents, tokenizer

    def __call__(self, model):
        return math.exp(evaluate(model, self.documents, self.tokenizer, protocol="recurrent").nats)


if __name__ == "__main__":
    main()
