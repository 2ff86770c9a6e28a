"""The invariants of reading that everything else rests on, in float64, for every form of memory.

GPT-2 identity, chunk invariance, batch invariance, causality, a state that does not grow. Those of training are in
test_invariants_training.py.
"""

from itertools import pairwise

import pytest
import torch
from conftest import ALL_FORMS, DATA, FORMS, WINDOW, assert_same_state, random_ids
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import GPT2LMHeadModel

from recur_gpt2 import RecurGPT2LMHeadModel, RecurState

MINI = DATA / "gpt2-mini"
forms = st.sampled_from(list(FORMS))
all_forms = st.sampled_from(list(ALL_FORMS))
parallels = st.sampled_from([1, 2, 3, 50])


def property_test(examples):
    return settings(max_examples=examples, deadline=None)


# ---- 1: GPT-2 identity -----------------------------------------------------------------------------------------------


@property_test(40)
@given(form=forms, length=st.integers(1, WINDOW), rows=st.integers(1, 3), seed=st.integers(0, 99))
@torch.no_grad()
def test_a_first_window_is_exactly_gpt2(make_model, gpt2, form, length, rows, seed):
    ids = random_ids(rows, length, seed=seed)
    assert_close(make_model(form)(ids).logits, gpt2(ids).logits, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_first_window_that_is_padded_is_exactly_gpt2(make_model, gpt2):
    ids = random_ids(1, WINDOW)
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1]])
    out = make_model("default")(ids, attention_mask=mask).logits
    assert_close(out[mask > 0], gpt2(ids[mask > 0][None]).logits[0])


@torch.no_grad()
def test_without_memory_every_window_is_exactly_gpt2(make_model, gpt2):
    ids = random_ids(2, 4 * WINDOW + 3)
    logits = make_model("none")(ids, parallel_windows=2).logits
    expected = [gpt2(piece).logits for piece in ids.split(WINDOW, dim=1)]
    assert_close(logits, torch.cat(expected, dim=1), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_window_may_be_all_the_positions_there_are(make_model, gpt2):
    model = make_model("default", window=64)
    ids = random_ids(2, 64 + 20)
    logits = model(ids).logits
    assert_close(logits[:, :64], gpt2(ids[:, :64]).logits, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(logits[:, 64:], gpt2(ids[:, 64:]).logits)


@torch.no_grad()
def test_a_first_window_of_a_real_gpt2_is_that_gpt2():
    ids = torch.randint(8192, (2, 64), generator=torch.Generator().manual_seed(0))
    model = RecurGPT2LMHeadModel.from_gpt2(MINI, window=64)
    expected = GPT2LMHeadModel.from_pretrained(MINI, dtype=torch.float32).eval()(ids).logits
    assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


# ---- 2: chunk invariance ---------------------------------------------------------------------------------------------


@property_test(60)
@given(
    form=all_forms,
    pieces=st.lists(st.tuples(st.integers(1, 3 * WINDOW), parallels), min_size=1, max_size=6),
    parallel=parallels,
)
@torch.no_grad()
def test_a_document_in_pieces_is_the_document_at_once(make_model, form, pieces, parallel):
    model = make_model(form)
    ids = random_ids(2, sum(length for length, _ in pieces))
    whole = model(ids, parallel_windows=parallel)
    state, logits = None, []
    for (_, piece_parallel), piece in zip(pieces, ids.split([length for length, _ in pieces], dim=1), strict=True):
        out = model(piece, state=state, parallel_windows=piece_parallel)
        state, logits = out.state, [*logits, out.logits]
    assert_close(torch.cat(logits, dim=1), whole.logits)
    assert_same_state(state, whole.state)


@pytest.mark.parametrize("form", ALL_FORMS)
@torch.no_grad()
def test_token_by_token_is_the_document_at_once(make_model, form):
    model, ids = make_model(form), random_ids(2, 2 * WINDOW + 3)
    whole, state, logits = model(ids), None, []
    for token in ids.split(1, dim=1):
        out = model(token, state=state)
        state, logits = out.state, [*logits, out.logits]
    assert_close(torch.cat(logits, dim=1), whole.logits)
    assert_same_state(state, whole.state)


@pytest.mark.parametrize("form", ALL_FORMS)
@torch.no_grad()
def test_reading_whole_windows_is_reading_the_document(make_model, form):
    """`read`, which training walks through, and `forward`, which users call."""
    model, ids = make_model(form).transformer, random_ids(3, 5 * WINDOW)
    whole = model(ids)
    hidden, state = model.forward_windows(ids.view(3, 5, WINDOW), torch.zeros(3, 5, dtype=torch.bool))
    assert_close(hidden.flatten(1, 2), whole.last_hidden_state)
    assert_same_state(state, whole.state)


@pytest.mark.parametrize("form", ALL_FORMS)
@torch.no_grad()
def test_documents_side_by_side_in_a_lane_do_not_know_of_each_other(make_model, form):
    model = make_model(form).transformer
    ids = random_ids(2, 6, WINDOW)
    starts = torch.tensor([[True, False, True, False, False, True], [False, True, True, False, True, False]])
    _, earlier = model.forward_windows(random_ids(2, 2, WINDOW, seed=1), torch.zeros(2, 2, dtype=torch.bool))
    for size in (1, 2, 6):
        state, hidden = earlier, []
        for piece, flags in zip(ids.split(size, dim=1), starts.split(size, dim=1), strict=True):
            out, state = model.forward_windows(piece, flags, state)
            hidden.append(out)
        hidden = torch.cat(hidden, dim=1)
        for row, borders in ((0, (0, 2, 5, 6)), (1, (1, 2, 4, 6))):
            for first, end in pairwise(borders):
                alone = model(ids[row, first:end].reshape(1, -1))
                assert_close(hidden[row, first:end].reshape(1, -1, 32), alone.last_hidden_state)
            assert_same_state(state.select([row]), alone.state)  # the last document of the row


@pytest.mark.parametrize("form", ALL_FORMS)
@torch.no_grad()
def test_a_state_from_a_file_goes_on_as_the_state_itself(make_model, form, tmp_path):
    model, ids = make_model(form), random_ids(2, 3 * WINDOW + 5)
    whole = model(ids)
    model(ids[:, :21]).state.save(tmp_path / "state.safetensors")
    out = model(ids[:, 21:], state=RecurState.load(tmp_path / "state.safetensors"))
    assert_close(out.logits, whole.logits[:, 21:])
    assert_same_state(out.state, whole.state)


# ---- 3: batch invariance ---------------------------------------------------------------------------------------------


@st.composite
def padded_calls(draw):
    """One to three calls of a batch: for each row and call its tokens, spread over more places on any side."""
    rows, calls = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    return [
        {
            "lengths": draw(st.lists(st.integers(0, 2 * WINDOW + 3), min_size=rows, max_size=rows)),
            "spare": draw(st.integers(0, 5)),
            "side": draw(st.sampled_from(["left", "right", "middle", "anywhere"])),
            "parallel": draw(parallels),
        }
        for _ in range(calls)
    ]


def spread(lengths, places, side, generator):
    """(B, N) mask with so many ones a row."""
    mask = torch.zeros(len(lengths), places, dtype=torch.int64)
    for row, length in enumerate(lengths):
        if side == "anywhere":
            mask[row, torch.randperm(places, generator=generator)[:length]] = 1
        else:
            gap = places - length
            first = {"left": gap, "right": 0, "middle": gap // 2}[side]
            mask[row, first : first + length] = 1
    return mask


@property_test(60)
@given(form=all_forms, calls=padded_calls(), seed=st.integers(0, 99))
@torch.no_grad()
def test_a_row_of_a_padded_batch_gets_what_it_gets_alone(make_model, form, calls, seed):
    assume(all(any(call["lengths"]) for call in calls))
    model, generator = make_model(form), torch.Generator().manual_seed(seed)
    rows, state, documents, logits = len(calls[0]["lengths"]), None, [], []
    for number, call in enumerate(calls):
        mask = spread(call["lengths"], max(call["lengths"]) + call["spare"], call["side"], generator)
        ids = random_ids(*mask.shape, seed=seed + number)
        out = model(ids, attention_mask=mask, state=state, parallel_windows=call["parallel"])
        state = out.state
        documents.append([ids[row][mask[row] > 0] for row in range(rows)])
        logits.append([out.logits[row][mask[row] > 0] for row in range(rows)])
    for row in range(rows):
        document = torch.cat([call[row] for call in documents])[None]
        if not document.numel():
            assert_same_state(state.select([row]), RecurState.empty(1))
            continue
        alone = model(document)
        assert_close(torch.cat([call[row] for call in logits]), alone.logits[0])
        assert_same_state(state.select([row]), alone.state)


@pytest.mark.parametrize("form", ALL_FORMS)
@torch.no_grad()
def test_what_stands_at_padding_changes_nothing(make_model, form):
    model, generator = make_model(form), torch.Generator().manual_seed(0)
    mask = spread([5, 2 * WINDOW, WINDOW + 3], 2 * WINDOW + 3, "anywhere", generator)
    ids = random_ids(*mask.shape)
    first = model(ids, attention_mask=mask)
    second = model(torch.where(mask > 0, ids, random_ids(*mask.shape, seed=1)), attention_mask=mask)
    assert torch.equal(first.logits[mask > 0], second.logits[mask > 0])
    assert_same_state(first.state, second.state, rtol=0, atol=0)


@pytest.mark.parametrize("form", ALL_FORMS)
@torch.no_grad()
def test_a_row_without_tokens_keeps_its_state(make_model, form):
    model = make_model(form)
    mask = spread([WINDOW + 6, WINDOW + 1, 3, 0], WINDOW + 6, "right", None)
    before = model(random_ids(*mask.shape), attention_mask=mask).state
    mask = spread([0, 2 * WINDOW, 0, 0], 2 * WINDOW, "right", None)
    after = model(random_ids(*mask.shape, seed=1), attention_mask=mask, state=before).state
    assert_same_state(after.select([0, 2, 3]), before.select([0, 2, 3]), rtol=0, atol=0)


# ---- 4: causality ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [1, 4])
@pytest.mark.parametrize("form", ALL_FORMS)
@torch.no_grad()
def test_a_token_moves_nothing_before_it_and_through_memory_what_comes_windows_later(make_model, form, parallel):
    model, ids = make_model(form), random_ids(1, 4 * WINDOW)
    before = model(ids, parallel_windows=parallel).logits
    # Only the last positions of a window may be kept, and sinks know no document.
    reaches = form not in ("none", "sinks only", "t2r", "near", "rfa, sinks only")
    for place in (0, 1, WINDOW - 1, WINDOW, 2 * WINDOW - 1, 2 * WINDOW + 3):
        changed = ids.clone()
        changed[0, place] = (ids[0, place] + 1) % 97
        moved = (model(changed, parallel_windows=parallel).logits - before).abs().amax(dim=(0, 2))
        assert not moved[:place].any()
        end = (place // WINDOW + 1) * WINDOW
        assert moved[place:end].all()
        assert bool(moved[end:].any()) == reaches
        if reaches:
            assert moved[end : end + WINDOW].all()


@pytest.mark.parametrize("form", ALL_FORMS)
@torch.no_grad()
def test_a_token_moves_nothing_before_it_in_a_window_that_goes_on(make_model, form):
    model = make_model(form)
    state = model(random_ids(2, WINDOW + 2)).state
    ids = random_ids(2, WINDOW, seed=1)
    before = model(ids, state=state).logits
    for place in range(WINDOW):
        changed = ids.clone()
        changed[:, place] = (ids[:, place] + 1) % 97
        moved = (model(changed, state=state).logits - before).abs().amax(dim=(0, 2))
        assert not moved[:place].any()
        assert moved[place]


@pytest.mark.parametrize("form", ["gated", "yoshida2020", "pooled above", "all slots, some layers", "carried"])
@torch.no_grad()
def test_memory_that_is_carried_reaches_further_than_one_window(make_model, form):
    """Many windows on, the first one still has a part in what is predicted."""
    model, ids = make_model(form), random_ids(1, 6 * WINDOW)
    other = ids.clone()
    other[:, :WINDOW] = random_ids(1, WINDOW, seed=1)
    moved = (model(other).logits - model(ids).logits).abs().amax(dim=2)
    assert moved[:, -WINDOW:].all()


# ---- 9: memory -------------------------------------------------------------------------------------------------------


def held(state):
    """Bytes that a state keeps alive, whatever its tensors are views of."""
    tensors = (state.windows, state.filled, *state.memory.values(), *state.window.values())
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("form", ALL_FORMS)
@torch.no_grad()
def test_the_state_does_not_grow_with_the_document(make_model, form):
    model, sizes = make_model(form).transformer, []
    for windows, parallel in ((3, 1), (3, 50), (40, 1), (300, 50)):
        state = None
        for piece in random_ids(1, windows * WINDOW + 3).split(100 * WINDOW, dim=1):
            state = model(piece, state=state, parallel_windows=parallel).state
        sizes += [state.nbytes, held(state)]
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("form", ALL_FORMS)
@torch.no_grad()
def test_whole_windows_read_together_leave_a_state_of_one(make_model, form):
    read = make_model(form).transformer.forward_windows
    states = [read(random_ids(1, n, WINDOW), torch.zeros(1, n, dtype=torch.bool))[1] for n in (1, 2, 40)]
    assert len(set(map(held, states))) == 1
