"""benchmarks/embedding_*.py: the scores and the ways of reading that vectors are compared by are what they say."""

import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, WINDOW
from numpy.testing import assert_allclose

from recur_gpt2.embedding.batching import Reader

sys.path.insert(0, str(ROOT / "benchmarks"))

from embedding_rows import disjoint, overlapping, shuffled
from embedding_tasks import Text, by_book, probe, retrieval

BOOKS = np.repeat(np.arange(5), 4)


def some_ids(*lengths):
    return [np.random.default_rng(n).integers(97, size=n) for n in lengths]


@pytest.mark.parametrize("centred", [False, True])
def test_retrieval_is_what_a_loop_finds(centred):
    vectors = np.random.default_rng(0).normal(size=(20, 3)) + BOOKS[:, None] + 5
    at_1, reciprocal = retrieval(vectors, BOOKS, centred=centred)
    if centred:
        vectors = vectors - vectors.mean(axis=0)
    for query in range(20):
        cosines = {
            n: vectors[n] @ vectors[query] / np.linalg.norm(vectors[n]) / np.linalg.norm(vectors[query])
            for n in range(20)
            if n != query
        }
        ranked = sorted(cosines, key=cosines.get, reverse=True)
        rank = 1 + next(place for place, n in enumerate(ranked) if BOOKS[n] == BOOKS[query])
        assert at_1[query] == (rank == 1)
        assert reciprocal[query] == pytest.approx(1 / rank)


def test_a_probe_tells_books_that_differ_and_not_those_that_do_not():
    random = np.random.default_rng(0)
    apart, noise = (random.normal(size=(20, 8)) + 3 * scale * np.eye(8)[BOOKS] for scale in (3, 0))
    assert probe(apart, BOOKS, apart + 0.1, BOOKS).mean() == 1
    assert probe(noise, BOOKS, random.normal(size=(20, 8)), BOOKS).mean() < 0.6
    assert by_book(np.array([1, 0, 1, 1]), np.array([0, 0, 3, 3])).tolist() == [0.5, 1]


def test_a_part_of_a_text_has_its_own_characters():
    text = Text("abcdef", np.arange(3), np.array([[0, 2], [2, 4], [4, 6]]), book=1)
    part = text.part(1, 3)
    assert (part.text, part.ids.tolist(), part.offsets.tolist(), part.book) == ("cdef", [1, 2], [[0, 2], [2, 4]], 1)


@torch.no_grad()
def test_overlapping_takes_the_reading_with_more_in_front(make_model):
    model, ids = make_model("none"), some_ids(3 * WINDOW + 2, 2 * WINDOW)
    found = overlapping(Reader(model.transformer, 4, 1), ids)
    for own, hidden in zip(ids, found, strict=True):
        for place in range(len(own)):
            start = max(0, (place - WINDOW // 2) // (WINDOW // 2) * (WINDOW // 2)) if place >= WINDOW else 0
            expected = model.transformer(torch.tensor(own[None, start : place + 1])).last_hidden_state[0, -1]
            assert_allclose(hidden[place], expected, rtol=1e-6, atol=1e-8)


@torch.no_grad()
def test_shuffled_reads_with_another_texts_memory(make_model):
    core, ids = make_model("default").transformer, some_ids(2 * WINDOW + 3, 3 * WINDOW + 1, 2 * WINDOW)
    reader = Reader(core, 4, 1)
    found, true = shuffled(reader, ids), disjoint(reader, ids)
    for row, own in enumerate(ids):
        assert_allclose(found[row][:WINDOW], true[row][:WINDOW], rtol=1e-6)  # nothing to be shuffled yet
        other = ids[(row + 1) % len(ids)]
        state = core(torch.tensor(other[None, :WINDOW])).state
        expected = core(torch.tensor(own[None, WINDOW : 2 * WINDOW]), state=state).last_hidden_state[0]
        assert_allclose(found[row][WINDOW : 2 * WINDOW], expected, rtol=1e-6, atol=1e-8)
        assert len(found[row]) == len(own)
