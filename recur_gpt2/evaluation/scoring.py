"""Score documents with one model by name: what `recur-gpt2 evaluate` does, and what a comparison does for its rows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..data.corpora import Corpus, load_corpus
from ..errors import InputError
from ..models.hub import load_tokenizer
from ..models.loading import load_any
from ..training.precision import autocast_dtype
from ..utils.device import checked_device
from .arguments import EvaluationArguments
from .evaluate import Evaluation, evaluate
from .horizons import measure_horizons
from .protocols import PROTOCOLS, obstacle


def evaluate_model(args: EvaluationArguments) -> dict:
    """Score documents with one model, by each protocol named.

    Returns:
        {"rows", "loss_by_document", "tokens_by_document"} as in results.json, "split_rule", how the split was made
        where the data came without, and, if asked for, "horizons".

    Raises:
        InputError: bad input of any kind.
    """
    device = checked_device(args.device)
    tokenizer = load_tokenizer(args.model)
    model = load_any(args.model, args.window, args.recurrence).to(device)
    corpus = load_corpus(args.data, args.split, tokenizer)
    documents = evaluation_documents(corpus, args.eval_tokens or None)
    if args.stride and "overlap" not in (args.protocols or PROTOCOLS):
        raise InputError(f"stride={args.stride} is of the protocol overlap; add it to --protocols")
    obstacles = {name: obstacle(each, model.config.is_recurrent, len(documents)) for name, each in PROTOCOLS.items()}
    for name in args.protocols or ():
        if name not in obstacles:
            raise InputError(f"protocol {name!r} is not known; use some of {', '.join(obstacles)}")
        if obstacles[name]:
            raise InputError(f"protocol {name!r} {obstacles[name]}, or leave it out")
    possible = [name for name, why in obstacles.items() if why is None]
    dtype = autocast_dtype(model, args.precision, training=False)
    options = {"stride": args.stride, "lanes": args.lanes, "parallel_windows": args.parallel_windows}
    options |= {"dtype": dtype, "progress": True}
    _check_horizons(args, possible)
    evaluations = {
        name: evaluate(model, documents, tokenizer, protocol=name, **options) for name in args.protocols or possible
    }
    del options["stride"]
    horizons = (
        args.horizons and measure_horizons(model, documents, evaluations["recurrent"], args.horizons, **options).rows()
    )
    window, words = model.config.window, args.word_count
    rows = [each.row(name, PROTOCOLS[name].reported, window, words) for name, each in evaluations.items()]
    found = {"rows": rows, **by_document(evaluations), "split_rule": corpus.split_rule}
    return found | ({"horizons": horizons} if horizons else {})


def _check_horizons(args, possible):
    """Refuse horizons where the whole document's state is not scored."""
    if args.horizons and "recurrent" not in (args.protocols or possible):
        way_out = "add it to --protocols" if "recurrent" in possible else "give a model that has a recurrence"
        raise InputError(f"horizons={args.horizons} need the protocol recurrent beside them; {way_out}")


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
