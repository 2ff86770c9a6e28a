"""Loss on rare words that a document has used before, by how far back: where a memory of the document shows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

# Last occurrence so many windows ago: from, to (inclusive).
DISTANCES = {"same window": (0, 0), "1": (1, 1), "2": (2, 2), "3-4": (3, 4), "5-8": (5, 8), "9-16": (9, 16)}
BEYOND = {"further": (17, 10**9)}
RARE = 10e-6  # of all words of the corpus, at most
# In the alphabet of byte-level BPE, where a blank is Ġ, a line's end Ċ and a tabulator ĉ.
WORD = re.compile(r"[^\W\d_ĠĊĉ]+")


def word_counts(documents: Iterable[np.ndarray], tokenizer: PreTrainedTokenizerBase) -> Counter:
    """How often each word stands in a corpus, to say which are rare."""
    counts: Counter = Counter()
    for tokens in documents:
        counts.update(word for word, _, _ in _words(tokens, tokenizer))
    return counts


def rare_word_rows(
    documents: Sequence[np.ndarray],
    losses: Mapping[str, Sequence[np.ndarray]],
    tokenizer: PreTrainedTokenizerBase,
    counts: Counter,
    *,
    window: int,
    longer: int,
) -> list[dict]:
    """Mean nats a token of rare words, by the distance to their last occurrence in the document.

    Args:
        documents: token ids (n,) each.
        losses: {protocol: nats (n - 1,) of each document}.
        counts: of the corpus (`word_counts`).
        window: T, which distances are counted in.
        longer: tokens of a longer window; the last row is of words in whose longer window their last occurrence
            stands, one window of T or more before.

    Returns:
        {"distance", "tokens", protocol: nats, ...} each.
    """
    most = RARE * counts.total()
    found: dict[str, list[tuple[int, int, int]]] = {name: [] for name in (*DISTANCES, *BEYOND, "never", "seen")}
    for number, tokens in enumerate(documents):
        last: dict[str, int] = {}
        for word, first, end in _words(tokens, tokenizer):
            if counts[word] <= most and first > 0:
                before = last.get(word)
                found[_bin(first, before, window)].append((number, first, end))
                if before is not None and before // longer == first // longer and before // window < first // window:
                    found["seen"].append((number, first, end))
            last[word] = first
    rows = []
    for name, places in found.items():
        row = {"distance": name, "tokens": sum(end - first for _, first, end in places)}
        if places:  # token i is predicted at position i - 1
            for protocol, each in losses.items():
                parts = [each[number][first - 1 : end - 1] for number, first, end in places]
                row[protocol] = float(np.concatenate(parts).mean())
        rows.append(row)
    return rows


def _bin(first, before, window):
    if before is None:
        return "never"
    distance = first // window - before // window
    return next(name for name, (low, high) in (DISTANCES | BEYOND).items() if low <= distance <= high)


def _words(tokens, tokenizer):
    """(word, its first token, the one behind its last) of token ids (n,), in their order."""
    pieces = tokenizer.convert_ids_to_tokens(tokens.tolist())
    ends = np.cumsum([len(piece) for piece in pieces])
    for match in WORD.finditer("".join(pieces)):
        first, last = np.searchsorted(ends, (match.start(), match.end() - 1), side="right")
        yield match.group(), int(first), int(last) + 1
