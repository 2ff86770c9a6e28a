"""decoder.py: stepping token by token is reading, for every form of memory and attention, wherever the rows are."""

import pytest
import torch
from conftest import ALL_FORMS, WINDOW, assert_same_state, random_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from recur_gpt2 import RecurState
from recur_gpt2.models.decoder import Decoder

all_forms = st.sampled_from(list(ALL_FORMS))
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def read_apart(model, lengths, seed):
    """Rows that have read as many tokens each, none for 0 -> their state."""
    states = [
        model.transformer(random_ids(1, length, seed=seed + row)).state if length else RecurState.empty(1)
        for row, length in enumerate(lengths)
    ]
    return RecurState.join(states)


@settings(max_examples=60, deadline=None)
@given(
    form=all_forms,
    before=st.lists(st.integers(0, 3 * WINDOW + 1), min_size=1, max_size=4),
    steps=st.integers(1, 2 * WINDOW + 2),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_steps_are_reading(make_model, form, before, steps, seed):
    model = make_model(form)
    state = read_apart(model, before, seed)
    ids = random_ids(len(before), steps, seed=seed + 50)
    expected = model.transformer(ids, state=state)
    decoder = Decoder(model.transformer, state)
    hidden = torch.cat([decoder.step(token) for token in ids.split(1, dim=1)], dim=1)
    assert_close(hidden, expected.last_hidden_state, **EXACT)
    assert_same_state(decoder.state(), expected.state, **EXACT)


@pytest.mark.parametrize("form", ALL_FORMS)
@torch.no_grad()
def test_windows_turn_over_at_every_offset(make_model, form):
    """Rows that have read 0 to 2 windows and one token pass the border of a window at steps of their own."""
    model, before = make_model(form), list(range(2 * WINDOW + 2))
    state = read_apart(model, before, seed=0)
    ids = random_ids(len(before), WINDOW + 1, seed=1)
    decoder = Decoder(model.transformer, state)
    for place, token in enumerate(ids.split(1, dim=1)):
        expected = model.transformer(token, state=state)
        assert_close(
            decoder.step(token), expected.last_hidden_state, msg=lambda m, place=place: f"{place}: {m}", **EXACT
        )
        state = expected.state
    assert_same_state(decoder.state(), state, **EXACT)


@settings(max_examples=20, deadline=None)
@given(form=all_forms, before=st.lists(st.integers(0, 2 * WINDOW), min_size=3, max_size=3), seed=st.integers(0, 99))
@torch.no_grad()
def test_rows_change_places(make_model, form, before, seed):
    model = make_model(form)
    state = read_apart(model, before, seed)
    decoder = Decoder(model.transformer, state)
    rows = torch.tensor([2, 0, 2])
    decoder.reorder(rows)
    ids = random_ids(3, WINDOW, seed=seed)
    expected = model.transformer(ids, state=state.select(rows))
    hidden = torch.cat([decoder.step(token) for token in ids.split(1, dim=1)], dim=1)
    assert_close(hidden, expected.last_hidden_state, **EXACT)
    assert_same_state(decoder.state(), expected.state, **EXACT)


@torch.no_grad()
def test_a_state_copied_out_is_not_changed_by_later_steps(make_model):
    model = make_model("t2r, default")
    decoder = Decoder(model.transformer, read_apart(model, [WINDOW + 3], seed=0))
    state = decoder.state()
    copies = {name: tensor.clone() for name, tensor in (state.memory | state.window).items()}
    for token in random_ids(1, 2 * WINDOW).split(1, dim=1):
        decoder.step(token)
    for name, tensor in (state.memory | state.window).items():
        assert_close(tensor, copies[name], rtol=0, atol=0)


@pytest.mark.parametrize("form", ["default", "t2r, default", "near, default", "yoshida2020"])
@torch.no_grad()
def test_buffers_stay_where_they_are(make_model, form):
    """After the first window, which leaves the first memory, nothing that is kept is made anew."""
    model = make_model(form)
    decoder = Decoder(model.transformer, read_apart(model, [WINDOW], seed=0))

    def places():
        kept = [each for layer in decoder.layers for each in layer.buffers]
        return [each.data_ptr() for each in [*kept, decoder.sums, *decoder.memory.values()] if each.numel()]

    before, size = places(), decoder.nbytes
    for token in random_ids(1, 4 * WINDOW).split(1, dim=1):
        decoder.step(token)
    assert places() == before
    assert decoder.nbytes == size


@torch.no_grad()
def test_sixteen_bit_steps_are_near_reading(make_model):
    model = make_model("default", dtype=torch.bfloat16)
    state = read_apart(model, [WINDOW + 2, 3], seed=0)
    ids = random_ids(2, WINDOW, seed=1)
    decoder = Decoder(model.transformer, state)
    hidden = torch.cat([decoder.step(token) for token in ids.split(1, dim=1)], dim=1)
    assert_close(hidden, model.transformer(ids, state=state).last_hidden_state, rtol=0.1, atol=0.2)
