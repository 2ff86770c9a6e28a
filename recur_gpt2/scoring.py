"""Score documents with one model by name: what `recur-gpt2 evaluate` does, and what a comparison does for its rows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from .corpora import Corpus, load_corpus
from .errors import InputError
from .evaluation import CONTROLS, PARALLEL_WINDOWS, PROTOCOLS, Evaluation, evaluate
from .loading import load_any, load_tokenizer
from .precision import autocast_dtype


def evaluate_model(
    name_or_path: str,
    data: str,
    *,
    split: str = "test",
    window: int | None = None,
    recurrence: str = "none",
    protocols: list[str] | None = None,
    eval_tokens: int | None = None,
    lanes: int = 8,
    parallel_windows: int = PARALLEL_WINDOWS,
    precision: str = "auto",
    device: str = "auto",
) -> dict:
    """Score a split with one model, by each protocol and control named.

    Returns:
        {"rows", "loss_by_document", "tokens_by_document"} as in results.json.

    Raises:
        InputError: bad input of any kind.
    """
    device = checked_device(device)
    tokenizer = load_tokenizer(name_or_path)
    model = load_any(name_or_path, window, recurrence).to(device)
    documents = evaluation_documents(load_corpus(data, split, tokenizer), eval_tokens)
    possible = (*PROTOCOLS, *CONTROLS) if model.config.is_recurrent else PROTOCOLS[:2]
    if len(documents) < 2:
        possible = tuple(name for name in possible if name != "shuffled")
    unknown = [name for name in protocols or () if name not in possible]
    if unknown:
        raise InputError(f"protocol {unknown[0]!r} is not one of this model's; use {', '.join(possible)}")
    dtype = autocast_dtype(model, precision)
    protocol_of = {name: "recurrent" if name in CONTROLS else name for name in protocols or possible}
    evaluations = {
        name: evaluate(
            model,
            documents,
            tokenizer,
            protocol=protocol,
            control=name if name in CONTROLS else None,
            lanes=lanes,
            parallel_windows=parallel_windows,
            dtype=dtype,
            progress=True,
        )
        for name, protocol in protocol_of.items()
    }
    rows = [each.row(name, protocol_of[name], model.config.window) for name, each in evaluations.items()]
    return {"rows": rows, **by_document(evaluations)}


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


def checked_device(name: str) -> str:
    """A device by name, "auto" resolved. Raises InputError for a GPU that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device='cuda' was asked for, but PyTorch sees no GPU; use --device cpu")
    return name
