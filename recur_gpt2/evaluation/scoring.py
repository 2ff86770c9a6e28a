"""Score documents with one model by name: what `recur-gpt2 evaluate` does, and what a comparison does for its rows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..data.corpora import Corpus, load_corpus
from ..data.files import ALL
from ..errors import InputError, check_range
from ..models.hub import load_tokenizer
from ..models.loading import load_any
from ..training.precision import autocast_dtype
from ..utils.device import checked_device
from .evaluate import PARALLEL_WINDOWS, Evaluation, evaluate
from .protocols import PROTOCOLS, obstacle


def evaluate_model(
    name_or_path: str,
    data: str,
    *,
    split: str = ALL,
    window: int | None = None,
    recurrence: str = "none",
    protocols: list[str] | None = None,
    eval_tokens: int | None = None,
    lanes: int = 8,
    parallel_windows: int = PARALLEL_WINDOWS,
    precision: str = "auto",
    device: str = "auto",
) -> dict:
    """Score documents with one model, by each protocol named.

    Args:
        split: as `load_corpus` takes it: "all" reads data without splits of its own whole.
        protocols: of PROTOCOLS; None: all that this model and these documents allow.

    Returns:
        {"rows", "loss_by_document", "tokens_by_document"} as in results.json, and "split_rule", how the split was made
        where the data came without.

    Raises:
        InputError: bad input of any kind.
    """
    check_range(1, lanes=lanes, parallel_windows=parallel_windows)
    check_range(2, eval_tokens=eval_tokens)
    device = checked_device(device)
    tokenizer = load_tokenizer(name_or_path)
    model = load_any(name_or_path, window, recurrence).to(device)
    corpus = load_corpus(data, split, tokenizer)
    documents = evaluation_documents(corpus, eval_tokens)
    obstacles = {name: obstacle(each, model.config.is_recurrent, len(documents)) for name, each in PROTOCOLS.items()}
    for name in protocols or ():
        if name not in obstacles:
            raise InputError(f"protocol {name!r} is not known; use some of {', '.join(obstacles)}")
        if obstacles[name]:
            raise InputError(f"protocol {name!r} {obstacles[name]}, or leave it out")
    possible = [name for name, why in obstacles.items() if why is None]
    dtype = autocast_dtype(model, precision, training=False)
    options = {"lanes": lanes, "parallel_windows": parallel_windows, "dtype": dtype, "progress": True}
    evaluations = {
        name: evaluate(model, documents, tokenizer, protocol=name, **options) for name in protocols or possible
    }
    rows = [each.row(name, PROTOCOLS[name].reported, model.config.window) for name, each in evaluations.items()]
    return {"rows": rows, **by_document(evaluations), "split_rule": corpus.split_rule}


def by_document(evaluations: Mapping[str, Evaluation]) -> dict:
    """What intervals are made of: nats of each document for every evaluation, and the tokens that they all scored."""
    nats = {name: [float(losses.sum()) for losses in each.losses] for name, each in evaluations.items()}
    first = next(iter(evaluations.values()), None)
    return {"loss_by_document": nats, "tokens_by_document": [len(losses) for losses in first.losses] if first else []}


def evaluation_documents(corpus: Corpus, tokens: int | None) -> list[np.ndarray]:
    """Documents to score: whole, or the first tokens of each, as many from each and `tokens` in all."""
    if tokens is None:
        return list(corpus.documents())
    if corpus.num_documents is None:
        raise InputError("eval_tokens needs to know how many documents there are; leave it out for streamed data")
    share = max(2, tokens // corpus.num_documents)
    return [ids[:share] for ids in corpus.documents()]
