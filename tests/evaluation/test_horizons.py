"""horizons.py against a plain loop; rare_words.py on words whose distances are known."""

import numpy as np
import pytest
import torch
from conftest import DATA
from helpers_training import WINDOW as T
from helpers_training import WordTokenizer, random_documents, tiny_model

from recur_gpt2.errors import InputError
from recur_gpt2.evaluation import horizons
from recur_gpt2.evaluation.evaluate import evaluate
from recur_gpt2.evaluation.horizons import WHOLE, measure_horizons
from recur_gpt2.evaluation.rare_words import rare_word_rows, word_counts
from recur_gpt2.models.hub import load_tokenizer
from recur_gpt2.models.state import RecurState

DOCUMENTS = random_documents((9 * T + 3, 3 * T + 1, 6 * T))


@pytest.fixture(scope="module")
def model():
    return tiny_model(pointer_slots=5 * T).double()


@pytest.fixture
def whole(model):
    return evaluate(model, DOCUMENTS, WordTokenizer(), protocol="recurrent")


@torch.no_grad()
def plain_losses(model, tokens, window, horizon):
    """Nats of a window's targets, behind `horizon` windows read one by one from the state of an empty document."""
    state = RecurState(torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    ids = torch.from_numpy(tokens)[None]
    for number in range(window - horizon, window + 1):
        out = model(ids[:, number * T : (number + 1) * T], state=state)
        state = out.state
    targets = ids[0, window * T + 1 : (window + 1) * T + 1]
    return torch.nn.functional.cross_entropy(out.logits[0], targets, reduction="none").numpy()


@pytest.mark.parametrize("parallel", [1, 3])
def test_the_same_windows_are_scored_with_states_of_the_last_windows_alone(model, whole, parallel, monkeypatch):
    monkeypatch.setattr(horizons, "WINDOWS", 3)
    found = measure_horizons(model, DOCUMENTS, whole, [0, 1, 4], lanes=2, parallel_windows=parallel).losses
    chosen = {0: [4, 6, 8], 2: [4]}  # the second document has no window with four before it
    assert [each.shape for each in found[WHOLE]] == [(3, T), (1, T)]
    for horizon in (0, 1, 4):
        for each, (number, windows) in zip(found[horizon], chosen.items(), strict=True):
            for row, window in zip(each, windows, strict=True):
                np.testing.assert_allclose(row, plain_losses(model, DOCUMENTS[number], window, horizon), rtol=1e-5)
    for each, (number, windows) in zip(found[WHOLE], chosen.items(), strict=True):
        for row, window in zip(each, windows, strict=True):
            np.testing.assert_array_equal(row, whole.losses[number][window * T : (window + 1) * T])


def test_rows_say_by_how_much_the_whole_documents_state_is_better(model, whole):
    found = measure_horizons(model, DOCUMENTS, whole, [0, 2])
    rows = {row["horizon"]: row for row in found.rows()}
    assert list(rows) == [0, 2, WHOLE]
    flat = {
        horizon: np.concatenate([each.ravel() for each in documents]) for horizon, documents in found.losses.items()
    }
    for horizon, row in rows.items():
        assert row["nats"] == pytest.approx(flat[horizon].mean())
        assert row["behind_whole"] == pytest.approx((flat[horizon] - flat[WHOLE]).mean(), abs=1e-7)
        low, high = row["behind_whole_interval"]
        assert low <= row["behind_whole"] + 1e-7
        assert high >= row["behind_whole"] - 1e-7
    assert rows[0]["behind_whole"] != 0


def test_documents_that_are_too_short_are_refused(model, whole):
    with pytest.raises(InputError, match=r"horizons=\[16\]: no document has more than 16 full windows of 8 tokens"):
        measure_horizons(model, DOCUMENTS, whole, [16])


def test_rare_words_are_put_by_the_windows_since_they_stood_last():
    tokenizer = load_tokenizer(str(DATA / "gpt2-mini"))
    filler = tokenizer(" and the")["input_ids"]
    name = tokenizer(" Zebulon")["input_ids"]
    tokens, starts = [], []
    for repeats in (0, 1, 20, 40):  # once, in the same window, two windows of 16 on, five windows on
        tokens += filler * repeats
        starts.append(len(tokens) if repeats else None)
        tokens += name
    tokens = np.array(tokens)
    losses = {"one": [np.arange(len(tokens) - 1, dtype=np.float32)]}
    counts = word_counts([np.array(filler * 100_000)], tokenizer)
    rows = rare_word_rows([tokens], losses, tokenizer, counts, window=16, longer=64)
    found = {row["distance"]: row for row in rows if row["tokens"]}
    for start in starts[1:]:
        distance = start // 16 - (starts[starts.index(start) - 1] or 0) // 16
        bin = {0: "same window", 2: "2", 3: "3-4", 5: "5-8"}[distance]
        assert found[bin]["tokens"] == len(name)
        assert found[bin]["one"] == pytest.approx(np.arange(start - 1, start - 1 + len(name)).mean())
    assert "never" not in found  # a document's first token is not predicted
    assert found["seen"]["tokens"] == len(name)  # two windows on, in the same 64 tokens
