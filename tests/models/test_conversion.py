"""conversion.py, and what a converted model can do: be saved and loaded, fused for inference, decode as it reads."""

import pyarrow.parquet as pq
import pytest
import torch
from conftest import ALL_FORMS, DATA, FORMS, LINEAR_FORMS, WINDOW, assert_same_state, random_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from recur_gpt2 import InputError, RecurGPT2LMHeadModel, convert_to_t2r

LONG = 4 * WINDOW + 3


def softmax_model(folder, form="default", **options):
    return RecurGPT2LMHeadModel.from_gpt2(folder, **{"window": WINDOW} | FORMS[form] | options)


@pytest.fixture(autouse=True)
def quick_fits(request, monkeypatch):
    """How well a map fits matters to the tests on the real GPT-2 alone."""
    if "slow" not in request.keywords:
        monkeypatch.setattr("recur_gpt2.models.feature_map_fitting.FIT_STEPS", 5)
        monkeypatch.setattr("recur_gpt2.models.feature_map_fitting.DISTIL_STEPS", 2)


def is_linear(model):
    return [block.feature_map is not None for block in model.transformer.h]


# ---- which layers, which map -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "expected"), [("all", [0, 1, 2, 3]), ("75%", [1, 2, 3]), ([2, 0], [0, 2])], ids=str)
def test_the_layers_named_are_converted_and_the_others_kept(gpt2_folder, layers, expected):
    model = softmax_model(gpt2_folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert convert_to_t2r(model, layers, feature_size=6) is model
    assert model.config.linear_layers == expected
    assert is_linear(model) == [layer in expected for layer in range(4)]
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_every_fourth_layer_from_the_top_keeps_softmax():
    from recur_gpt2 import RecurGPT2Config

    assert RecurGPT2Config(n_layer=12, linear_layers="75%").linear_layers == [1, 2, 3, 5, 6, 7, 9, 10, 11]


@pytest.mark.parametrize("form", LINEAR_FORMS)
@torch.no_grad()
def test_converting_gives_the_model_that_is_made_from_the_checkpoint(gpt2_folder, form):
    options = dict(ALL_FORMS[form])
    t2r = {key: options.pop(key) for key in list(options) if key in ("feature_map", "feature_size", "near_tokens")}
    layers, carry = options.pop("linear_layers"), options.pop("carry_linear_state", False)
    torch.manual_seed(0)
    made = RecurGPT2LMHeadModel.from_gpt2(gpt2_folder, window=WINDOW, **ALL_FORMS[form]).double()
    torch.manual_seed(0)
    model = RecurGPT2LMHeadModel.from_gpt2(gpt2_folder, window=WINDOW, **options)
    model = convert_to_t2r(model, layers, **t2r, carry_linear_state=carry).double()
    assert model.config.to_dict() == made.config.to_dict()
    ids = random_ids(2, LONG)
    assert_close(model(ids).logits, made(ids).logits)


def test_a_model_without_a_head_is_converted_too(gpt2_folder):
    model = convert_to_t2r(softmax_model(gpt2_folder), feature_size=6)
    core = convert_to_t2r(softmax_model(gpt2_folder).transformer, feature_size=6)
    assert_close(core(random_ids(1, LONG)).last_hidden_state, model.transformer(random_ids(1, LONG)).last_hidden_state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [4]}, r"linear_layers=\[4\] must be distinct layers from 0 to 3"),
        ({"layers": [1, 1]}, "must be distinct layers"),
        ({"layers": "50%"}, 'linear_layers=\'50%\' is not known; use "all", "75%" or a list of layers'),
        ({"layers": []}, "names no layer to convert"),
        ({"feature_map": "relu"}, "feature_map='relu' is not known; use one of t2r, elu, rfa, hedgehog"),
        ({"feature_map": "hedgehog", "feature_size": 7}, "use an even number"),
        ({"feature_size": 0}, "feature_size=0 must be at least 1"),
        ({"near_tokens": -1}, "near_tokens=-1 must be from 0 to window=8"),
        ({"near_tokens": 9}, "near_tokens=9 must be from 0 to window=8"),
    ],
    ids=str,
)
def test_what_cannot_be_converted_is_refused_and_left_as_it_was(gpt2_folder, options, message):
    model = softmax_model(gpt2_folder)
    config, logits = model.config.to_dict(), model(random_ids(1, LONG)).logits
    with pytest.raises(InputError, match=message):
        convert_to_t2r(model, **options)
    assert model.config.to_dict() == config
    assert torch.equal(model(random_ids(1, LONG)).logits, logits)


def test_converting_twice_is_refused(gpt2_folder):
    model = convert_to_t2r(softmax_model(gpt2_folder), [1], feature_size=6)
    with pytest.raises(InputError, match=r"layers \[1\] have linear attention already; convert the model"):
        convert_to_t2r(model, [2])


def test_near_places_are_of_linear_layers(gpt2_folder):
    with pytest.raises(InputError, match="near_tokens=3 are of linear layers; name some in linear_layers"):
        softmax_model(gpt2_folder, near_tokens=3)


@torch.no_grad()
def test_where_the_whole_window_is_near_nothing_changes(gpt2_folder):
    """With nothing in front of the window; any map and gate will do."""
    model, ids = softmax_model(gpt2_folder, "none").double(), random_ids(2, LONG)
    expected = model(ids).logits
    assert_close(convert_to_t2r(model, feature_size=6, near_tokens=WINDOW)(ids).logits, expected)


@torch.no_grad()
def test_near_places_bound_the_state(gpt2_folder):
    model = convert_to_t2r(softmax_model(gpt2_folder, "none"), feature_size=6, near_tokens=3)
    states = [model(random_ids(1, length)).state for length in (1, 4, WINDOW - 1)]
    assert len({state.nbytes for state in states}) == 1
    assert states[0].window["tail.0"].shape == (1, 2, 4, 3, 8)


def test_sums_are_not_carried_beside_pooled_layers(gpt2_folder):
    with pytest.raises(InputError, match=r"carry_linear_state=True cannot be combined with pool_layers=\[3\]"):
        convert_to_t2r(softmax_model(gpt2_folder, "yoshida2020"), carry_linear_state=True)


# ---- as any other model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", LINEAR_FORMS)
@torch.no_grad()
def test_a_converted_model_can_be_saved_and_loaded(make_model, form, tmp_path):
    model = make_model(form, torch.float32)
    model.save_pretrained(tmp_path)
    loaded = RecurGPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert loaded.config.linear_layers == model.config.linear_layers
    ids = random_ids(2, LONG)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, model(ids).logits)


@settings(max_examples=25, deadline=None)
@given(form=st.sampled_from(list(LINEAR_FORMS)), prompt=st.integers(1, LONG), seed=st.integers(0, 99))
@torch.no_grad()
def test_decoding_token_by_token_picks_what_reading_anew_picks(make_model, form, prompt, seed):
    """Invariant 5 for greedy decoding: the cached state picks the token that a reading of everything picks."""
    model, ids = make_model(form), random_ids(2, prompt, seed=seed)
    out = model(ids)
    for _ in range(WINDOW + 3):
        token = out.logits[:, -1:].argmax(dim=-1)
        ids = torch.cat((ids, token), dim=1)
        out = model(token, state=out.state)
        anew = model(ids)
        assert_close(out.logits[:, -1], anew.logits[:, -1])
        assert torch.equal(out.logits[:, -1].argmax(dim=-1), anew.logits[:, -1].argmax(dim=-1))


@torch.no_grad()
def test_linear_layers_keep_sums_instead_of_keys_and_values(make_model):
    model = make_model("t2r")
    sizes = [model(random_ids(1, length)).state.nbytes for length in (1, WINDOW // 2, WINDOW - 1)]
    assert len(set(sizes)) == 1, "a state of fixed size, wherever in the window"
    names = model(random_ids(1, 3)).state.window.keys()
    assert names == {f"linear.{layer}" for layer in range(4)}


# ---- fused for inference ---------------------------------------------------------------------------------------------


@pytest.fixture
def fused(make_model):
    """form -> the shared model with its maps folded in, for the time of a test."""
    used = []

    def fuse(form, dtype=torch.float64):
        used.append(make_model(form, dtype))
        return used[-1].fuse_feature_maps()

    yield fuse
    for model in used:
        model.train()
        model.eval()


@pytest.mark.parametrize("form", LINEAR_FORMS)
@torch.no_grad()
def test_fused_maps_change_neither_logits_nor_state(make_model, fused, form):
    ids = random_ids(2, LONG)
    expected = make_model(form)(ids)
    model, state, logits = fused(form), None, []
    for piece in ids.split([WINDOW + 3, 1, 1, LONG - WINDOW - 5], dim=1):
        out = model(piece, state=state, parallel_windows=2)
        state, logits = out.state, [*logits, out.logits]
    assert_close(torch.cat(logits, dim=1), expected.logits)
    assert_same_state(state, expected.state)


@torch.no_grad()
def test_fused_queries_are_never_built(fused):
    model = fused("t2r")
    for block in model.transformer.h:
        width = block.attn.embed_dim
        assert block.fused_weight.shape == (4 * 6 + 4 * 6 + width, width)
    hooked = [
        block.attn.c_attn.register_forward_hook(lambda *_: pytest.fail("c_attn ran")) for block in model.transformer.h
    ]
    model(random_ids(1, LONG))
    for hook in hooked:
        hook.remove()


def test_training_goes_back_to_the_maps_themselves(make_model, fused):
    model = fused("t2r")
    assert all(block.fused_weight is not None for block in model.transformer.h)
    model.train()
    assert all(block.fused_weight is None for block in model.transformer.h)
    loss = model(random_ids(1, LONG), labels=random_ids(1, LONG)).loss
    assert torch.autograd.grad(loss, model.transformer.h[0].feature_map.weight)[0].any()


def test_fused_weights_are_not_saved(fused, tmp_path):
    model = fused("t2r", torch.float32)
    assert not any("fused" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    assert_close(
        RecurGPT2LMHeadModel.from_pretrained(tmp_path)(random_ids(1, 9)).logits, model(random_ids(1, 9)).logits
    )


def test_maps_that_are_not_affine_stay_as_they_are(fused):
    for form in ("elu, all slots", "rfa, sinks only"):
        assert all(block.fused_weight is None for block in fused(form).transformer.h)


# ---- on a real GPT-2 -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
def test_the_fitted_maps_start_far_nearer_to_softmax_than_random_ones(monkeypatch):
    monkeypatch.setattr(
        "recur_gpt2.models.feature_map_fitting.DISTIL_STEPS", 20
    )  # a fifth of the time, and most of the gain
    text = pq.read_table(DATA / "pg19-sample" / "validation.parquet", columns=["text"])["text"][0].as_py()
    tokenizer = AutoTokenizer.from_pretrained(DATA / "gpt2-mini")
    book = torch.tensor([tokenizer(text[20_000:30_000])["input_ids"][:1024]])
    model = RecurGPT2LMHeadModel.from_gpt2(DATA / "gpt2-mini", window=128, recurrence="none")
    softmax = float(model(book, labels=book).loss)
    convert_to_t2r(model, "75%")
    fitted = float(model(book, labels=book).loss)
    for block in model.transformer.h:
        if block.feature_map is not None:
            block.feature_map.reset_parameters()
    as_made = float(model(book, labels=book).loss)
    assert softmax < fitted < softmax + 0.6
    assert as_made > fitted + 0.2
