"""generation.py: transformers' generate() picks what full recomputation picks, for any length and from any state."""

import logging

import pytest
import torch
from conftest import ALL_FORMS, GPT2_OPTIONS, WINDOW, assert_same_state, random_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from recur_gpt2 import RecurState
from recur_gpt2.errors import InputError
from recur_gpt2.models.cache import RecurCache
from recur_gpt2.models.outputs import CACHE

all_forms = st.sampled_from(list(ALL_FORMS))
EXACT = {"rtol": 1e-9, "atol": 1e-9}
GREEDY = {"do_sample": False}


def generate(model, ids, **options):
    """With a mask: without one transformers takes every token that is the padding's number for padding."""
    options = {"attention_mask": torch.ones_like(ids), "eos_token_id": None, "pad_token_id": 0} | options
    return model.generate(ids, **options)


@torch.no_grad()
def recomputed(model, ids, count, mask=None, state=None):
    """Greedy tokens, each from reading everything again."""
    for _ in range(count):
        logits = model(ids, attention_mask=mask, state=state).logits[:, -1]
        ids = torch.cat((ids, logits.argmax(dim=-1, keepdim=True)), dim=1)
        mask = None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=1)
    return ids


def left_padded(lengths, seed=0):
    """Prompts of these lengths, padded on the left, and their mask."""
    longest = max(lengths)
    ids = random_ids(len(lengths), longest, seed=seed)
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    return ids * mask, mask.long()


@settings(max_examples=30, deadline=None)
@given(form=all_forms, lengths=st.lists(st.integers(1, 3 * WINDOW), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_greedy_tokens_are_those_of_full_recomputation(make_model, form, lengths, seed):
    model, (ids, mask) = make_model(form), left_padded(lengths, seed)
    expected = recomputed(model, ids, WINDOW + 3, mask)
    assert generate(model, ids, attention_mask=mask, max_new_tokens=WINDOW + 3, **GREEDY).equal(expected)


@pytest.mark.parametrize("offset", range(WINDOW + 1))
@pytest.mark.parametrize("form", ["default", "t2r, default", "near, default", "yoshida2020"])
def test_windows_turn_over_wherever_the_prompt_ends(make_model, form, offset):
    model, ids = make_model(form), random_ids(2, WINDOW + offset + 1)
    assert generate(model, ids, max_new_tokens=2 * WINDOW, **GREEDY).equal(recomputed(model, ids, 2 * WINDOW))


def test_prompt_and_text_may_be_longer_than_all_positions(make_model):
    model, ids = make_model("default"), random_ids(1, 3 * GPT2_OPTIONS["n_positions"] + 5)
    assert generate(model, ids, max_new_tokens=100, **GREEDY).equal(recomputed(model, ids, 100))


@settings(max_examples=10, deadline=None)
@given(form=all_forms, length=st.integers(1, 2 * WINDOW), rows=st.integers(1, 2), seed=st.integers(0, 99))
def test_beams_are_those_without_a_cache(make_model, form, length, rows, seed):
    """transformers' own beam search, which without a cache reads everything again for every token."""
    model, ids = make_model(form), random_ids(rows, length, seed=seed)
    options = GREEDY | {"num_beams": 3, "max_new_tokens": WINDOW + 2, "num_return_sequences": 2}
    expected = generate(model, ids, use_cache=False, **options)
    assert generate(model, ids, **options).equal(expected)
    assert len(expected) == 2 * rows


def test_sampling_draws_what_it_draws_without_a_cache(make_model):
    model, (ids, mask) = make_model("all slots, some layers"), left_padded([5, 2 * WINDOW + 1, 1])
    options = {"attention_mask": mask, "max_new_tokens": 2 * WINDOW, "do_sample": True, "top_k": 20, "top_p": 0.9}
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        options |= {"num_return_sequences": 2, "repetition_penalty": 1.2}
        drawn.append(generate(model, ids, use_cache=use_cache, **options))
    assert drawn[0].equal(drawn[1])
    assert len(drawn[0]) == 6


@settings(max_examples=20, deadline=None)
@given(form=all_forms, before=st.integers(1, 3 * WINDOW), more=st.integers(1, WINDOW), seed=st.integers(0, 99))
def test_generation_goes_on_from_a_state(make_model, form, before, more, seed):
    model, ids = make_model(form), random_ids(1, before + more, seed=seed)
    state = model.read(ids[0, :before], progress=False)
    whole = generate(model, ids, max_new_tokens=WINDOW, **GREEDY)
    continued = generate(model, ids[:, before:], state=state, max_new_tokens=WINDOW, **GREEDY)
    assert continued.equal(whole[:, before:])


def test_one_state_goes_to_several_prompts(make_model):
    model, ids = make_model("default"), random_ids(1, 2 * WINDOW + 3)
    state, prompts = model.read(ids[0], progress=False), random_ids(3, 4, seed=1)
    together = generate(model, prompts, state=state, max_new_tokens=WINDOW, **GREEDY)
    for prompt, row in zip(prompts, together, strict=True):
        alone = recomputed(model, torch.cat((ids, prompt[None]), dim=1), WINDOW)
        assert row.equal(alone[0, ids.shape[1] :])
    with pytest.raises(InputError, match="3 rows for 4 prompts"):
        generate(model, random_ids(4, 2), state=state.select([0, 0, 0]), max_new_tokens=2)


def test_what_generate_returns_can_be_gone_on_with(make_model):
    """As in transformers, with the whole text; or from its state, with what comes after it."""
    model, ids = make_model("default"), random_ids(2, WINDOW + 2)
    expected = recomputed(model, ids, 3 * WINDOW)
    out = generate(model, ids, max_new_tokens=WINDOW, return_dict_in_generate=True, **GREEDY)
    assert isinstance(out[CACHE], RecurCache)
    state = out[CACHE].state()
    assert_same_state(state, model(out.sequences[:, :-1]).state, **EXACT)
    tail = generate(model, out.sequences[:, -1:], state=state, max_new_tokens=2 * WINDOW, **GREEDY)
    assert tail[:, 1:].equal(expected[:, -2 * WINDOW :])
    more = {CACHE: out[CACHE], "max_new_tokens": 2 * WINDOW}
    assert generate(model, out.sequences, **more, **GREEDY).equal(expected)
    with pytest.raises(InputError, match="has read"):
        generate(model, out.sequences[:, :5], **more, **GREEDY)


def test_the_cache_has_the_name_that_transformers_own_outputs_give_it(make_model):
    """`cache` from 5.24 on, `past_key_values` before; both are taken as arguments, and neither with a warning."""
    plain = GPT2LMHeadModel(GPT2Config(**GPT2_OPTIONS))
    model, ids = make_model("default"), random_ids(1, 3)
    ours, theirs = model(ids, use_cache=True), plain(ids, use_cache=True)
    assert CACHE in theirs
    assert CACHE in ours
    reread = model(torch.cat((ids, ids), dim=1)).logits[:, -3:]
    for name in ("cache", "past_key_values"):
        out = model(ids, **{name: RecurCache(model, ours[CACHE].state())})
        assert_close(out.logits, reread, **EXACT)
    with pytest.raises(InputError, match="two words for one thing"):
        model(ids, cache=ours[CACHE], past_key_values=ours[CACHE])


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_generate_takes_a_cache_or_a_state_under_either_name_without_a_warning(make_model, name, caplog):
    model, ids = make_model("default"), random_ids(1, WINDOW + 3)
    expected = recomputed(model, ids, 4)
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(caplog.handler)
    try:
        cache = model(ids[:, :-1], use_cache=True)[CACHE]
        state = cache.state()
        assert generate(model, ids, max_new_tokens=4, **{name: cache}, **GREEDY).equal(expected)
        more = generate(model, ids[:, -1:], max_new_tokens=4, **{name: state}, **GREEDY)
    finally:
        transformers_logger.removeHandler(caplog.handler)
    assert more[:, 1:].equal(expected[:, -4:])
    assert not [record for record in caplog.records if "deprecated" in record.getMessage()]


def test_a_cache_of_another_kind_is_refused_unless_it_is_empty(make_model):
    """A generate() that makes one for every model, as transformers does for its own, is not let down by that."""
    model, ids = make_model("default"), random_ids(1, 3)
    assert_close(model(ids, cache=DynamicCache()).logits, model(ids).logits, **EXACT)
    filled = DynamicCache()
    filled.update(torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, 8), 0)
    with pytest.raises(InputError, match="a DynamicCache is another model's"):
        model(ids, cache=filled)


@pytest.mark.parametrize("form", ["default", "near, default", "near, whole window", "t2r, default"])
def test_a_cache_that_was_reset_keeps_nothing_of_the_document_before(form, make_model):
    model, ids, other = make_model(form), random_ids(1, 2 * WINDOW + 3), random_ids(1, 3, seed=1)
    cache = model(ids, use_cache=True)[CACHE]
    cache.held = torch.zeros(1, 1, model.config.n_embd)
    cache.reset()
    for token in other.split(1, dim=1):
        model(token, cache=cache)
    fresh = RecurCache(model, RecurState.empty(1))
    for token in other.split(1, dim=1):
        model(token, cache=fresh)
    kept, expected = cache.state(), fresh.state()
    assert all(torch.equal(kept.window[name], tensor) for name, tensor in expected.window.items())


def test_a_held_token_is_read_once_however_it_is_gone_on_from(make_model):
    """It was read before: for several texts from it, and never again after other tokens."""
    model, ids = make_model("default"), random_ids(1, WINDOW + 3)
    expected = recomputed(model, ids, WINDOW)[:, ids.shape[1] :]

    def holding():
        cache = RecurCache(model, model(ids[:, :-1]).state)
        cache.held = model.step(cache, ids[:, -1:])
        cache.seen = 0
        return cache

    several = generate(model, ids[:, -1:], cache=holding(), max_new_tokens=WINDOW, num_return_sequences=2, num_beams=2)
    alone = generate(model, ids, max_new_tokens=WINDOW, num_return_sequences=2, num_beams=2)
    assert several[:, 1:].equal(alone[:, ids.shape[1] :])
    one = generate(model, ids[:, -1:], cache=holding(), max_new_tokens=WINDOW, **GREEDY)
    assert one[:, 1:].equal(expected)
    with pytest.raises(InputError, match="read already"):
        model(ids[:, -2:], cache=holding())
    cache = holding()
    cache.go_on(model(ids).state, seen=1)
    assert cache.held is None


def test_the_cache_does_not_grow(make_model):
    model, ids = make_model("t2r, default"), random_ids(2, WINDOW + 1)
    sizes = {
        generate(model, ids, max_new_tokens=n, return_dict_in_generate=True, **GREEDY)[CACHE].nbytes
        for n in (WINDOW, 10 * WINDOW)
    }
    assert len(sizes) == 1


def test_scores_and_hidden_states_are_those_of_reading(make_model):
    model, ids = make_model("default"), random_ids(1, WINDOW + 2)
    options = {"return_dict_in_generate": True, "output_logits": True, "output_hidden_states": True}
    out = generate(model, ids, max_new_tokens=WINDOW, **options, **GREEDY)
    read = model(out.sequences, output_hidden_states=True)
    assert_close(torch.stack(out.logits, dim=1).double(), read.logits[:, ids.shape[1] - 1 : -1], rtol=1e-5, atol=1e-5)
    last = torch.cat([step[-1] for step in out.hidden_states], dim=1)
    assert_close(last, read.hidden_states[-1][:, :-1], **EXACT)


def test_streamers_get_every_token_and_criteria_stop(make_model):
    class Kept(BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append(None)

    class After(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 20)

    model, ids, streamer = make_model("default"), random_ids(1, 5), Kept()
    stop = StoppingCriteriaList([After()])
    out = generate(model, ids, max_new_tokens=99, streamer=streamer, stopping_criteria=stop, **GREEDY)
    assert out.shape == (1, 20)
    assert streamer.tokens == [*out[0].tolist(), None]


@settings(max_examples=30, deadline=None)
@given(
    form=all_forms,
    lengths=st.lists(st.integers(1, 4 * WINDOW), min_size=1, max_size=3),
    kept=st.integers(1, 2 * WINDOW),
    parallel=st.integers(4, 6),
)
@torch.no_grad()
def test_the_last_logits_are_those_of_all(make_model, form, lengths, kept, parallel):
    model, (ids, mask) = make_model(form), left_padded(lengths)
    whole = model(ids, attention_mask=mask).logits
    kept = min(kept, ids.shape[1])
    for options in ({}, {"use_cache": True, "parallel_windows": parallel}):
        last = model(ids, attention_mask=mask, logits_to_keep=kept, **options).logits
        inside = mask[:, -kept:] > 0
        assert_close(last[inside], whole[:, -kept:][inside], **EXACT)
    places = torch.tensor([0, ids.shape[1] - 1])
    assert_close(model(ids, attention_mask=mask, logits_to_keep=places).logits, whole[:, places], **EXACT)


@settings(max_examples=30, deadline=None)
@given(form=all_forms, sizes=st.lists(st.integers(1, 5 * WINDOW), min_size=1, max_size=5), parallel=st.integers(1, 3))
def test_reading_in_chunks_leaves_the_state_of_reading_at_once(make_model, form, sizes, parallel):
    model, ids = make_model(form), random_ids(1, sum(sizes))[0]
    chunks = [chunk.tolist() for chunk in ids.split(sizes)]
    state = model.read(chunks, parallel_windows=parallel, progress=False)
    assert_same_state(state, model(ids[None]).state, **EXACT)
    assert_same_state(model.read(ids, progress=False), state, **EXACT)
    head = model.read(iter(chunks[:1]), progress=False)
    assert_same_state(model.read(chunks[1:], head, progress=False) if chunks[1:] else head, state, **EXACT)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens cannot be used"),
        ({"assistant_model": object()}, "assistant_model cannot be used"),
        ({"cache_implementation": "static"}, "cache_implementation cannot be used"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_windows_do_not_allow_is_refused(make_model, options, said):
    with pytest.raises(InputError, match=said):
        generate(make_model("default"), random_ids(1, 3), max_new_tokens=2, **options)


def test_other_bad_input_is_refused(make_model):
    model = make_model("default")
    with pytest.raises(InputError, match="nothing to read"):
        model.read([], progress=False)
    with pytest.raises(InputError, match="2 rows"):
        model.read([1, 2], RecurState.empty(2))
    with pytest.raises(InputError, match="labels"):
        model(random_ids(1, 3), labels=random_ids(1, 3), use_cache=True)
    cache = model(random_ids(1, 3), use_cache=True)[CACHE]
    with pytest.raises(InputError, match="forgotten"):
        cache.crop(1)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_close(model(random_ids(1, 3), cache=cache).logits, model(random_ids(1, 3)).logits, **EXACT)
