"""state.py: all that is carried, saved and loaded bit for bit, and never changed in place."""

import copy
import dataclasses
import gc
import itertools

import pytest
import torch
from conftest import ALL_FORMS, WINDOW, assert_same_state, random_ids
from safetensors.torch import save_file
from torch.testing import assert_close

from recur_gpt2 import InputError, RecurGPT2LMHeadModel, RecurState
from recur_gpt2.models.cache import RecurCache


def tensors(state):
    return {"windows": state.windows, "filled": state.filled} | {
        f"{group}.{key}": tensor for group in ("memory", "window") for key, tensor in getattr(state, group).items()
    }


def assert_identical(state, other):
    state, other = tensors(state), tensors(other)
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name


def ragged(model, lengths, seed=0):
    """The state of documents of these lengths."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return model(random_ids(len(lengths), max(lengths), seed=seed), attention_mask=mask).state


@pytest.fixture(params=ALL_FORMS)
def model(request, make_model):
    return make_model(request.param)


# ---- what it holds ---------------------------------------------------------------------------------------------------


def test_an_empty_state_is_the_start_of_a_document(model):
    empty = RecurState.empty(2)
    assert empty.batch_size == 2
    assert empty.windows.tolist() == empty.filled.tolist() == [0, 0]
    ids = random_ids(2, 20)
    assert torch.equal(model(ids, state=empty).logits, model(ids).logits)


def test_counters_are_the_documents_length_in_windows_and_tokens(model):
    state = ragged(model, [3, WINDOW, 2 * WINDOW + 5])
    assert state.windows.tolist() == [0, 1, 2]
    assert state.filled.tolist() == [3, 0, 5]
    assert state.windows.device.type == state.filled.device.type == "cpu"


def test_counters_begin_anew_with_a_document_inside_a_segment(model):
    starts = torch.tensor([[True, False, False], [True, False, True], [True, True, False]])
    ids = random_ids(3, 3, WINDOW)
    _, state = model.transformer.forward_windows(ids, starts)
    assert state.windows.tolist() == [3, 1, 2]
    starts = torch.tensor([[False, False, False], [False, True, False], [True, False, False]])
    _, state = model.transformer.forward_windows(ids, starts, state)
    assert state.windows.tolist() == [6, 2, 3]


def test_nbytes_are_those_of_all_tensors(model):
    state = ragged(model, [2 * WINDOW + 5, WINDOW + 1])
    assert state.nbytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors(state).values())


def test_a_finished_window_leaves_no_keys_and_values(model):
    assert ragged(model, [2 * WINDOW, WINDOW]).window == {}
    assert RecurState.empty(2).window == {}


def test_the_unfinished_window_is_as_long_as_the_longest_row_and_zero_beyond_a_rows_tokens(model):
    state = ragged(model, [2 * WINDOW, 3, WINDOW + 5])
    for name, tensor in state.window.items():
        if not name.isdigit():
            assert not tensor[0].any()
            assert tensor[1:].any() or not tensor.numel()
            continue
        assert tensor.shape[-2] == 5
        for row, filled in enumerate(state.filled.tolist()):
            assert not tensor[row, ..., filled:, :].any()
            assert tensor[row, ..., :filled, :].all()


# ---- what can be done with it ----------------------------------------------------------------------------------------


def test_a_state_is_never_changed_in_place(model):
    state = ragged(model, [WINDOW + 5, 3, 2 * WINDOW])
    before = {name: tensor.clone() for name, tensor in tensors(state).items()}
    for mask in (None, torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])):
        model(random_ids(3, 4), attention_mask=mask, state=state)
    model.transformer.forward_windows(random_ids(3, 2, WINDOW), torch.ones(3, 2, dtype=torch.bool), state)
    state.merge(torch.tensor([1]), state.select([0]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(state).items())
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.windows = state.filled


def test_a_state_can_be_branched_from(model):
    state = ragged(model, [WINDOW + 5, 3])
    ids, others = random_ids(2, 12, seed=1), random_ids(2, 12, seed=2)
    first = model(ids, state=state).logits
    model(others, state=state)
    assert torch.equal(model(ids, state=state).logits, first)


def test_detach_cuts_the_graph_and_keeps_the_numbers(make_model):
    state = make_model("default")(random_ids(2, 20)).state
    assert all(tensor.requires_grad for tensor in (*state.memory.values(), *state.window.values()))
    detached = state.detach()
    assert not any(tensor.requires_grad for tensor in tensors(detached).values())
    assert_identical(detached, state)


def is_wide(name):
    """Whether a part of a state is never in 16 bit."""
    return name in ("pooled", "pointer") or name.startswith("linear.")


def test_to_casts_what_is_computed_with_and_leaves_the_counters(model):
    state = ragged(model, [WINDOW + 5, 3])
    cast = state.to(torch.bfloat16)
    for name, tensor in (*cast.memory.items(), *cast.window.items()):
        assert tensor.dtype == (torch.float32 if is_wide(name) else torch.bfloat16)
    assert cast.windows.dtype == cast.filled.dtype == torch.int64
    for name, tensor in tensors(cast).items():
        assert_close(tensor.double(), tensors(state)[name].double(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rows", [[2, 0, 1], [1], [0, 0, 2, 2], [3], torch.tensor([3, 1])], ids=str)
def test_selected_rows_go_on_as_they_would_have_in_place(model, rows):
    lengths = [2 * WINDOW + 6, 3, WINDOW, 2 * WINDOW + 1]
    state = ragged(model, lengths).select(rows)
    longest = int(state.filled.max())
    assert all(tensor.shape[-2] == longest for name, tensor in state.window.items() if name.isdigit())
    ids = random_ids(4, 2 * WINDOW, seed=1)
    whole = model(ids, state=ragged(model, lengths))
    part = model(ids[rows], state=state)
    assert_close(part.logits, whole.logits[rows])
    assert_identical_rows(part.state, whole.state.select(rows))


def assert_identical_rows(state, other):
    state, other = tensors(state), tensors(other)
    assert state.keys() == other.keys()
    for name in state:
        assert_close(state[name], other[name])


def test_reorder_is_select(model):
    state = ragged(model, [WINDOW + 5, 3])
    assert_identical(state.reorder(torch.tensor([1, 0])), state.select([1, 0]))


@pytest.mark.parametrize("rows", [[0], [2, 1], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("before", [[WINDOW + 6, 2 * WINDOW, 3], [2, 3, 4], [WINDOW] * 3, [0, 1, 0]], ids=str)
@pytest.mark.parametrize("after", [[WINDOW, 2 * WINDOW, WINDOW], [1, WINDOW + 7, 5]], ids=str)
def test_merge_replaces_these_rows_and_no_others(make_model, rows, before, after):
    model = make_model("all slots, some layers")
    old = ragged(model, before) if any(before) else RecurState.empty(3)
    new = ragged(model, after[: len(rows)], seed=1)
    merged = old.merge(torch.tensor(rows), new)
    ids = random_ids(3, WINDOW + 3, seed=2)
    out = model(ids, state=merged).logits
    kept = [row for row in range(3) if row not in rows]
    assert_close(out[rows], model(ids[rows], state=new).logits)
    if kept:
        assert_close(out[kept], model(ids[kept], state=old.select(kept)).logits)
    longest = int(merged.filled.max())
    assert bool(merged.window) == (longest > 0)
    assert all(tensor.shape[-2] == longest for tensor in merged.window.values())


def test_merge_with_an_empty_state_forgets_the_rows(model):
    old = ragged(model, [WINDOW + 6, WINDOW + 3])
    merged = old.merge(torch.tensor([0]), RecurState.empty(1))
    ids = random_ids(2, 12, seed=1)
    out = model(ids, state=merged).logits
    assert_close(out[:1], model(ids[:1]).logits)
    assert_close(out[1:], model(ids[1:], state=old.select([1])).logits)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[WINDOW + 5, 3], [WINDOW, WINDOW], [3, 1]], ids=str)
def test_a_saved_state_comes_back_bit_for_bit(model, lengths, tmp_path):
    state = ragged(model, lengths)
    state.save(tmp_path / "state.safetensors")
    loaded = RecurState.load(tmp_path / "state.safetensors")
    assert_identical(loaded, state)
    ids = random_ids(2, 12, seed=1)
    assert torch.equal(model(ids, state=loaded).logits, model(ids, state=state).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_saved_state_keeps_its_type(make_model, dtype, tmp_path):
    state = ragged(make_model("default"), [WINDOW + 5, 3]).to(dtype)
    state.save(str(tmp_path / "state"))
    assert_identical(RecurState.load(str(tmp_path / "state")), state)


def test_an_empty_state_can_be_saved(tmp_path):
    RecurState.empty(3).save(tmp_path / "state.safetensors")
    assert_identical(RecurState.load(tmp_path / "state.safetensors"), RecurState.empty(3))


@pytest.mark.parametrize("change", [lambda state: state.select([1, 1, 0]), RecurState.detach], ids=["select", "detach"])
def test_a_derived_state_can_be_saved(make_model, change, tmp_path):
    state = change(ragged(make_model("all slots, some layers"), [WINDOW + 5, 3]))
    state.save(tmp_path / "state.safetensors")
    assert_identical(RecurState.load(tmp_path / "state.safetensors"), state)


def test_a_damaged_file_is_refused_by_name(make_model, tmp_path):
    path = tmp_path / "state.safetensors"
    ragged(make_model("default"), [WINDOW + 5]).save(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"state\.safetensors is not a readable state file .*; save the state again"):
        RecurState.load(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="not a readable state file"):
        RecurState.load(path)
    path.unlink()
    with pytest.raises(InputError, match=r"there is no state file .*state\.safetensors; give one that"):
        RecurState.load(path)


def test_another_files_tensors_are_refused(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match=r"weights\.safetensors holds no state of recur_gpt2"):
        RecurState.load(tmp_path / "weights.safetensors")


def test_a_state_of_another_batch_size_is_refused(model):
    state = ragged(model, [WINDOW + 5, 3])
    with pytest.raises(InputError, match="the state holds 2 rows and input_ids 3"):
        model(random_ids(3, 4), state=state)


# ---- joining ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[5], [5, 0, 20], [3, 8, 13], [0, 0], [16, 24]])
@pytest.mark.parametrize("form", ["default", "yoshida2020", "near, default", "carried, default"])
@torch.no_grad()
def test_joined_states_go_on_as_each_alone(form, lengths, make_model):
    model, more = make_model(form), random_ids(2 * len(lengths), 11, seed=1)
    states = [model(random_ids(2, n, seed=n)).state if n else RecurState.empty(2) for n in lengths]
    joined = model(more, state=RecurState.join(states))
    alone = [model(part, state=state) for part, state in zip(more.split(2), states, strict=True)]
    assert_close(joined.logits, torch.cat([out.logits for out in alone]))
    assert_same_state(joined.state, RecurState.join([out.state for out in alone]))


def test_a_state_of_another_model_is_refused(make_model, gpt2_folder, tmp_path):
    """Of other weights or another configuration; the same model in another number type or place is the same."""
    model, ids = make_model("default"), random_ids(1, WINDOW + 3)
    file = tmp_path / "state.safetensors"
    model(ids).state.select([0]).to(torch.float32).save(file)
    loaded = RecurState.load(file)
    assert loaded.fingerprint() == model(ids).state.fingerprint()
    for dtype in (torch.float32, torch.bfloat16):
        same = copy.deepcopy(model).to(dtype)
        same(ids, state=loaded.to(dtype))
        same.generate(ids, state=loaded.to(dtype), max_new_tokens=2, pad_token_id=0)
    finetuned = copy.deepcopy(model)
    finetuned.transformer.h[2].mlp.c_fc.weight.data += 0.01
    for other in (finetuned, make_model("default", last_slots=2), make_model("none")):
        with pytest.raises(InputError, match="left by another model"):
            other(ids, state=loaded)
        with pytest.raises(InputError, match="left by another model"):
            other.generate(ids, state=loaded, max_new_tokens=2)
    half = copy.deepcopy(model).to(torch.float16)
    half(ids, state=loaded)
    half(ids).state.save(tmp_path / "half.safetensors")
    for dtype in (torch.float32, torch.bfloat16):  # rounded twice, from float16
        copy.deepcopy(half).to(dtype)(ids, state=RecurState.load(tmp_path / "half.safetensors"))
    loaded.save(file)
    assert RecurState.load(file).origin == loaded.origin, "a state that was loaded keeps its fingerprint"


def test_a_live_state_of_another_model_is_refused_also_when_that_one_is_gone(make_model):
    model, ids = make_model("default"), random_ids(1, WINDOW + 3)
    other = copy.deepcopy(model)
    other.transformer.h[1].attn.c_attn.bias.data += 0.1
    state = other(ids).state
    cache = RecurCache(other, state).state()
    for left in (state, cache):
        with pytest.raises(InputError, match="left by another model"):
            model(ids, state=left)
        with pytest.raises(InputError, match="left by another model"):
            model.generate(ids, state=left, max_new_tokens=2)
    del other
    gc.collect()
    with pytest.raises(InputError, match="left by another model"):
        model(ids, state=state)
    twin = copy.deepcopy(model)
    assert torch.equal(model(ids, state=twin(ids).state).logits, model(ids, state=model(ids).state).logits)


def test_states_of_quantised_models_and_of_models_without_weights_go_on(make_model):
    model, ids = copy.deepcopy(make_model("default")), random_ids(1, WINDOW + 3)
    model.transformer.extra = torch.nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    model(ids, state=model(ids).state)
    assert model(ids).state.fingerprint()
    with torch.device("meta"):
        empty = RecurGPT2LMHeadModel(model.config).eval()
    empty(ids.to("meta"), state=empty(ids.to("meta")).state)


def test_a_state_goes_on_while_its_model_is_being_trained(make_model):
    model, ids = copy.deepcopy(make_model("default")).train(), random_ids(1, WINDOW + 3)
    state = model(ids).state.detach()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight += 0.1
    model(ids, state=state)


@pytest.mark.parametrize("form", ["carried, default", "near, default", "yoshida2020", "hedgehog, yoshida2020"])
def test_each_part_of_a_state_keeps_its_type_in_a_model_of_any(form, make_model, tmp_path):
    """Sums and what is pointed at are never in 16 bit; keys and values are in the model's type, from whichever type."""
    ids, models = random_ids(2, 2 * WINDOW + 3), {}
    for dtype in (torch.float32, torch.bfloat16):
        models[dtype] = copy.deepcopy(make_model(form)).to(dtype)
    for left, goes_on in itertools.product(models, repeat=2):
        state = models[left](ids).state
        state.save(tmp_path / "state.safetensors")
        loaded = RecurState.load(tmp_path / "state.safetensors")
        out = models[goes_on](ids[:, :2], state=loaded).state
        kept = RecurCache(models[goes_on], loaded).state()
        for name, tensor in itertools.chain(*(group.items() for s in (out, kept) for group in (s.memory, s.window))):
            assert tensor.dtype == (torch.float32 if is_wide(name) else goes_on), name
        for name, tensor in loaded.to(torch.bfloat16).memory.items():
            if is_wide(name):
                assert torch.equal(tensor, loaded.memory[name]), "not rounded on the way"


def test_a_state_whose_file_cannot_be_written_leaves_the_old_one(make_model, tmp_path, monkeypatch):
    state = make_model("default")(random_ids(1, WINDOW)).state
    state.save(tmp_path / "state.safetensors")
    before = (tmp_path / "state.safetensors").read_bytes()

    def failing(tensors, path, metadata):
        path.write_bytes(before[:10])
        raise OSError("no space left")

    monkeypatch.setattr("recur_gpt2.models.state.save_file", failing)
    with pytest.raises(OSError, match="no space"):
        state.save(tmp_path / "state.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]
    assert (tmp_path / "state.safetensors").read_bytes() == before
