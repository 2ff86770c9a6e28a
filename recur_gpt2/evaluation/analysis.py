"""What the memory carries, token by token: what `recur-gpt2 analyze` shows on its page.

A document is read twice, with its memory and with the memory removed; the gain on a token is the difference of its
losses. Some windows are then looked at closely: probabilities with and without, and what in memory was attended to.
B rows, W windows, T tokens a window, S slots that may be pointed at, M memory slots of a layer, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from ..models.modeling import RecurGPT2LMHeadModel
from ..models.pointer import POINTER
from .evaluate import evaluate
from .horizons import measure_horizons

LARGEST = 20  # gains that are listed
LIKELIEST = 5  # tokens, and places attended to, that are shown of each position
CONTEXT = 12  # tokens shown on either side of a place
BINS = 16  # of positions in a window


@dataclass(frozen=True)
class Shown:
    """What the analysis is of.

    Attributes:
        windows: to look at closely, spread evenly over the document.
        horizons: windows that states are built from; those that the document has room for.
    """

    windows: int = 6
    horizons: tuple[int, ...] = (0, 1, 2, 4, 8, 16)


def analyze(
    model: RecurGPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: np.ndarray,
    shown: Shown,
    *,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> dict:
    """Read a document with and without memory.

    Args:
        tokens: (n,) ids of the document.
        dtype: run the readings of the whole document under autocast to this type.
        progress: show bars.

    Returns:
        What the page shows, of numbers, strings, lists and dictionaries.

    Raises:
        InputError: the model has no memory, or the document is shorter than two windows and a token.
    """
    window = model.config.window
    if not model.config.is_recurrent:
        raise InputError("the model has no memory to analyze; give one that was finetuned with a recurrence")
    if len(tokens) <= 2 * window:
        raise InputError(
            f"the text has {len(tokens):,} tokens, which is no more than two windows of {window}; give a longer one"
        )
    options = {"dtype": dtype, "progress": progress, "lanes": 1}
    read = {name: evaluate(model, [tokens], tokenizer, protocol=name, **options) for name in ("recurrent", "zeroed")}
    gains = read["zeroed"].losses[0] - read["recurrent"].losses[0]
    pieces = _pieces(tokenizer, tokens)
    full = len(gains) // window
    numbers = sorted(set(np.linspace(1, full - 1, shown.windows).round().astype(int).tolist()))
    horizons = [horizon for horizon in shown.horizons if horizon < full]
    rows = measure_horizons(model, [tokens], read["recurrent"], horizons, **options).rows()
    return {
        "window": window,
        "tokens": len(tokens),
        "nats": {name: each.nats for name, each in read.items()},
        "pointer_slots": model.config.pointer_slots,
        "by_position": _by_position(gains, window),
        "by_horizon": [{"horizon": row["horizon"], "nats": row["nats"]} for row in rows],
        "largest": [_large_gain(place, gains, tokens, pieces) for place in np.argsort(-gains)[:LARGEST].tolist()],
        "windows": _looked_at(model, tokenizer, tokens, pieces, gains, numbers),
    }


def _by_position(gains, window):
    """Mean gains by position in the window, in bins, without the first window, which has no memory."""
    positions = np.arange(window, len(gains)) % window
    bins = positions * min(BINS, window) // window
    return [
        {"from": int(positions[bins == n].min()), "gain": float(gains[window:][bins == n].mean())}
        for n in np.unique(bins)
    ]


def _large_gain(place, gains, tokens, pieces):
    """The target of a position, what stands before it, and where it stood last."""
    target = place + 1
    earlier = np.flatnonzero(tokens[:target] == tokens[target])
    found = {"token": pieces[target], "gain": float(gains[place]), "before": _text(pieces, target - CONTEXT, target)}
    if len(earlier):
        last = int(earlier[-1])
        found |= {"distance": target - last, "earlier": _around(pieces, last)}
    return found


@torch.no_grad()
def _looked_at(model, tokenizer, tokens, pieces, gains, numbers):
    """For each of the windows its number and tokens; each token with probabilities and what was attended to."""
    window, state, shown = model.config.window, None, []
    ids = torch.from_numpy(tokens.astype(np.int64)).to(model.device)
    for before, number in pairwise([0, *numbers]):
        state = model.read(ids[before * window : number * window], state, progress=False)
        found = _window(model, ids[None, number * window : (number + 1) * window], state, number)
        described = _described(found, tokenizer, tokens, pieces, gains, number, window)
        shown.append({"number": number, "tokens": described})
    return shown


@dataclass(frozen=True)
class _Read:
    """One window, read twice.

    Attributes:
        memory, removed: probabilities (T, V).
        pointed: (T, S) shares of slots, and (S,) tokens of the document that they point at; None where the model does
            not point.
        attended: (T, M') mean weights of last positions over layers and heads, and (M',) where in the document they
            stood; None where they are not known.
    """

    memory: Tensor
    removed: Tensor
    pointed: tuple[Tensor, Tensor] | None
    attended: tuple[Tensor, Tensor] | None


def _window(model, ids, state, number) -> _Read:
    config = model.config
    with_weights = not config.linear_layers and config.last_slots and not config.pool_layers
    out = model(ids, state=state, output_attentions=bool(with_weights), output_hidden_states=True)
    shares = attended = None
    if model.transformer.recurrence.pointer is not None:
        left = config.window - 1  # slots of each window: its second token is the first that can be pointed at
        count = min(config.pointer_slots, number * left)
        slots = state.memory[POINTER][:, -count:]
        weights = model.transformer.recurrence.pointer.weights(out.hidden_states[-1], slots)[0, :, 1:]
        index = torch.arange(number * left - count, number * left)
        shares = weights, index // left * config.window + index % left + 1
    if with_weights:
        layers = torch.stack([out.attentions[layer][0] for layer in config.insert_layers])  # (L, H, T, M + F)
        first = config.sink_slots + config.pooled_slots
        last = layers[..., first : first + config.last_slots].mean(dim=(0, 1))
        attended = last, torch.arange(number * config.window - config.last_slots, number * config.window)
    removed = model(ids).logits[0]
    return _Read(out.logits[0].softmax(dim=-1), removed.softmax(dim=-1), shares, attended)


def _described(read, tokenizer, tokens, pieces, gains, number, window):
    """What the page shows of each token of a window but its first, whose prediction belongs to the window before."""
    described = []
    for position in range(window):
        place = number * window + position
        if place + 1 >= len(tokens):
            break
        target = int(tokens[place + 1])
        one = {"text": pieces[place + 1], "gain": float(gains[place])}
        for name, probabilities in (("memory", read.memory[position]), ("removed", read.removed[position])):
            one[name] = {"own": float(probabilities[target]), "likeliest": _likeliest(tokenizer, probabilities)}
        if read.pointed is not None:
            shares, places = read.pointed
            one["share"] = float(shares[position].sum())
            one["pointed"] = _most(shares[position], places, place, pieces)
        if read.attended is not None:
            weights, places = read.attended
            one["attended"] = _most(weights[position], places, place, pieces)
        described.append(one)
    return described


def _likeliest(tokenizer, probabilities):
    top = probabilities.topk(LIKELIEST)
    texts = [tokenizer.decode([index]) for index in top.indices.tolist()]
    return [{"text": text, "share": share} for text, share in zip(texts, top.values.tolist(), strict=True)]


def _most(weights, places, here, pieces):
    """The places with the largest weights: how far back, the text around them, and the weight."""
    top = weights.topk(min(LIKELIEST, len(weights)))
    found = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [
        {"back": here + 1 - int(places[n]), "share": share, **_around(pieces, int(places[n]))} for n, share in found
    ]


def _around(pieces, place):
    """A token of the document, with what stands before and behind it."""
    after = _text(pieces, place + 1, place + 1 + CONTEXT // 2)
    return {"left": _text(pieces, place - CONTEXT, place), "token": pieces[place], "right": after}


def _text(pieces, first, end):
    return "".join(pieces[max(0, first) : end])


def _pieces(tokenizer, tokens):
    """The text of each token; one that holds a part of a character has a replacement character."""
    return [tokenizer.decode([token]) for token in tokens.tolist()]
