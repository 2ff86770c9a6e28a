"""modeling.py: the manners of transformers (folders, Auto classes, labels), and what a naive reader computes."""

import copy

import naive
import pytest
import torch
from conftest import ALL_FORMS, DATA, FORMS, LINEAR_FORMS, WINDOW, random_gpt2, random_ids
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from recur_gpt2 import InputError, RecurGPT2Config, RecurGPT2LMHeadModel, RecurGPT2Model
from recur_gpt2.models.block import is_new
from recur_gpt2.models.loading import load_any

MINI = DATA / "gpt2-mini"
# What a GPT-2 checkpoint may say beside its sizes.
VARIANTS = {
    "gelu_new": {"activation_function": "gelu_new"},
    "gelu_pytorch_tanh": {"activation_function": "gelu_pytorch_tanh"},
    "relu": {"activation_function": "relu"},
    "n_inner": {"n_inner": 50},
    "inverse layer": {"scale_attn_by_inverse_layer_idx": True},
    "unscaled": {"scale_attn_weights": False},
    "upcast": {"reorder_and_upcast_attn": True},
    "epsilon": {"layer_norm_epsilon": 0.1},
    "untied": {"tie_word_embeddings": False},
    "dropout": {"embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1},
}


def same(model, other):
    """Whether two models hold the same weights, bit for bit."""
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


# ---- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [WINDOW, 3 * WINDOW + 3])
@pytest.mark.parametrize("form", ALL_FORMS)
def test_a_document_is_read_as_by_a_naive_reader(form, length, make_model):
    model = make_model(form)
    ids = random_ids(1, length)
    with torch.no_grad():
        assert_close(model(ids).logits[0], naive.read(model, ids[0]))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", ["default", "yoshida2020", "t2r, default"])
def test_any_kind_of_gpt2_is_read(form, variant, tmp_path):
    gpt2 = random_gpt2(**VARIANTS[variant])
    gpt2.save_pretrained(tmp_path)
    gpt2 = gpt2.double()
    model = RecurGPT2LMHeadModel.from_gpt2(tmp_path, window=WINDOW, **ALL_FORMS[form]).double()
    ids = random_ids(2, 2 * WINDOW + 3)
    with torch.no_grad():
        logits = model(ids).logits
        if form in FORMS:
            assert_close(logits[:, :WINDOW], gpt2(ids[:, :WINDOW]).logits)
        assert_close(logits[1], naive.read(model, ids[1]))
    assert (model.lm_head.weight is model.transformer.wte.weight) == (variant != "untied")


def test_the_fused_activation_is_the_unfused_one(gpt2, make_model):
    fused, unfused = make_model("none").transformer.h[0].mlp, gpt2.transformer.h[0].mlp
    assert type(fused.act) is not type(unfused.act)
    hidden = torch.randn(3, 5, 32, dtype=torch.float64)
    assert_close(fused(hidden), unfused(hidden), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ALL_FORMS)
def test_parallel_windows_compute_the_same(form, make_model):
    model, ids = make_model(form), random_ids(2, 7 * WINDOW + 3)
    expected = model(ids)
    for parallel in (2, 3, 7, 100):
        assert_close(model(ids, parallel_windows=parallel).logits, expected.logits)


@pytest.mark.parametrize("form", ALL_FORMS)
def test_16_bit_reads_as_32_bit_does_up_to_rounding(form, make_model):
    ids = random_ids(2, 3 * WINDOW + 3)
    expected = make_model(form, torch.float32)(ids).logits
    low = make_model(form, torch.bfloat16)(ids, parallel_windows=2).logits
    assert low.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        mixed = make_model(form, torch.float32)(ids, parallel_windows=2).logits
    for logits in (low, mixed):
        error = (logits.float() - expected).std() / expected.std()
        # Where all but a few ReLU features of a query are zero, its output is a ratio of small numbers.
        assert error < (0.1 if form in LINEAR_FORMS else 0.03)


def test_hidden_states_are_those_of_transformers(gpt2, make_model):
    ids = random_ids(2, WINDOW)
    ours = make_model("default")(ids, output_hidden_states=True)
    theirs = gpt2(ids, output_hidden_states=True)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 5
    for hidden, expected in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert_close(hidden, expected)
    assert make_model("default")(ids).hidden_states is None


@pytest.mark.parametrize("form", ALL_FORMS)
def test_hidden_states_cover_all_windows_and_are_zero_at_padding(form, make_model):
    model, ids = make_model(form), random_ids(2, 2 * WINDOW + 3)
    mask = torch.ones_like(ids)
    mask[0, 5:9] = 0
    out = model.transformer(ids, mask, output_hidden_states=True)
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    for hidden in out.hidden_states:
        assert hidden.shape == (2, 2 * WINDOW + 3, 32)
        assert not hidden[0, 5:9].any()
        assert hidden[1].all()
    alone = model.transformer(ids[1:], output_hidden_states=True).hidden_states
    assert_close([hidden[1:] for hidden in out.hidden_states], list(alone))


# ---- labels ----------------------------------------------------------------------------------------------------------


def test_the_loss_of_a_first_window_is_that_of_transformers(gpt2, make_model):
    ids = random_ids(2, WINDOW)
    labels = ids.clone()
    labels[0, 2:5] = labels[1, 0] = -100
    for target in (ids, labels):
        assert_close(make_model("default")(ids, labels=target).loss, gpt2(ids, labels=target).loss.double())


@pytest.mark.parametrize("form", ["default", "yoshida2020"])
def test_the_loss_is_the_mean_over_scored_successors_in_all_windows(form, make_model):
    model, ids = make_model(form), random_ids(2, 2 * WINDOW + 3)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.3, -100)
    out = model(ids, labels=labels, parallel_windows=2)
    assert_close(out.loss, cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padding_is_not_scored(side, make_model):
    model, documents = make_model("default"), [random_ids(1, length, seed=length) for length in (2 * WINDOW + 3, 11)]
    places = 2 * WINDOW + 3
    first = {"left": places - 11, "right": 0, "middle": 4}[side]
    ids = torch.cat((documents[0], random_ids(1, places, seed=99)))
    mask = torch.ones_like(ids)
    mask[1] = 0
    mask[1, first : first + 11] = 1
    ids[1, first : first + 11] = documents[1]
    ours = model(ids, mask, labels=ids).loss
    alone = [model(document, labels=document).loss for document in documents]
    assert_close(ours, (alone[0] * (places - 1) + alone[1] * 10) / (places - 1 + 10))
    assert_close(model(ids, mask, labels=ids.masked_fill(mask == 0, -100)).loss, ours)


def test_nothing_scored_is_a_loss_of_zero(make_model):
    ids = random_ids(2, 9)
    assert make_model("default")(ids, labels=torch.full_like(ids, -100)).loss == 0
    assert make_model("default")(ids[:, :1], labels=ids[:, :1]).loss == 0


@pytest.mark.parametrize("pads", ["left", "right", "between"])
def test_the_head_is_computed_once_for_logits_and_loss(pads, make_model):
    """And a head that does more than multiply, as adapters make it, is in the loss too."""
    model, ids = copy.deepcopy(make_model("default", pointer_slots=0)), random_ids(2, 2 * WINDOW + 3)
    mask = torch.ones_like(ids)
    mask[0, {"left": slice(5), "right": slice(-5, None), "between": slice(4, 9)}[pads]] = 0
    expected = model(ids, mask, labels=ids, logits_to_keep=1).loss
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    out = model(ids, mask, labels=ids)
    assert len(calls) == 1
    assert_close(out.loss, expected)
    model.lm_head.register_forward_hook(lambda module, args, logits: 2 * logits)
    doubled = model(ids, mask, labels=ids)
    assert_close(doubled.logits, 2 * out.logits)
    assert (doubled.loss - out.loss).abs() > 0.1


def test_labels_of_another_shape_are_refused(make_model):
    ids = random_ids(2, 9)
    with pytest.raises(InputError, match=r"labels have shape \(2, 8\); give that of input_ids, \(2, 9\)"):
        make_model("default")(ids, labels=ids[:, 1:])


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.zeros(2, 0, dtype=torch.int64), None, r"input_ids of shape \(2, 0\) hold no tokens"),
        (torch.zeros(5, dtype=torch.int64), None, r"input_ids of shape \(5,\) hold no tokens; give \(batch, tokens\)"),
        (random_ids(2, 5), torch.zeros(2, 5), "attention_mask is 0 everywhere"),
    ],
)
def test_input_without_tokens_is_refused(ids, mask, message, make_model):
    with pytest.raises(InputError, match=message):
        make_model("default")(ids, attention_mask=mask)


# ---- gradients and training mode -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ALL_FORMS)
def test_every_parameter_learns(form, make_model):
    model, ids = make_model(form), random_ids(2, 4 * WINDOW)
    one_layer = len(model.config.pool_layers) == 1  # there is nothing to mix
    named = {name: p for name, p in model.named_parameters() if p.numel() and not (one_layer and ".mix" in name)}
    loss = model(ids, labels=ids, parallel_windows=2).loss
    for name, gradient in zip(named, torch.autograd.grad(loss, named.values(), allow_unused=True), strict=True):
        assert gradient is not None, name
        assert gradient.any(), name


@pytest.mark.parametrize("parallel", [1, 3])
def test_dropout_is_drawn_in_training_only(parallel, tmp_path):
    random_gpt2(**VARIANTS["dropout"]).save_pretrained(tmp_path)
    model, ids = RecurGPT2LMHeadModel.from_gpt2(tmp_path, window=WINDOW, last_slots=3), random_ids(2, 3 * WINDOW)
    logits = model(ids, parallel_windows=parallel).logits
    assert torch.equal(model(ids, parallel_windows=parallel).logits, logits)
    model.train()
    first = model(ids, parallel_windows=parallel).logits
    assert not torch.allclose(first, model(ids, parallel_windows=parallel).logits)


# ---- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ALL_FORMS)
def test_a_saved_model_comes_back_bit_for_bit(form, make_model, tmp_path):
    model = make_model(form, torch.float32)
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    ids = random_ids(2, 2 * WINDOW + 3)
    for loader in (RecurGPT2LMHeadModel, AutoModelForCausalLM):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is RecurGPT2LMHeadModel
        assert same(loaded, model)
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    headless = AutoModel.from_pretrained(tmp_path)
    assert type(headless) is RecurGPT2Model
    assert same(headless, model.transformer)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is RecurGPT2Config
    assert {**config.to_dict(), "dtype": None} == {**loaded.config.to_dict(), "dtype": None}


def test_a_model_saved_in_16_bit_comes_back_in_16_bit(make_model, tmp_path):
    model = make_model("default", torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert same(RecurGPT2LMHeadModel.from_pretrained(tmp_path), model)
    assert RecurGPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_a_tokenizer_is_saved_beside_the_model(make_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(MINI)
    make_model("default").save_pretrained(tmp_path, tokenizer=tokenizer)
    text = "It was the best of times, it was the worst of times."
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert AutoConfig.from_pretrained(tmp_path).window == WINDOW


def test_the_model_without_a_head_can_be_saved_and_given_one(make_model, tmp_path):
    model = make_model("default", torch.float32)
    model.transformer.save_pretrained(tmp_path)
    assert same(RecurGPT2Model.from_pretrained(tmp_path), model.transformer)
    assert same(RecurGPT2LMHeadModel.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("form", ALL_FORMS)
def test_the_gpt2_in_it_has_gpt2s_names_and_weights(form, make_model, gpt2):
    ours, theirs = make_model(form).state_dict(), gpt2.state_dict()
    assert {name for name in ours if not is_new(name)} == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    fresh = random_gpt2(seed=1).double()
    fresh.load_state_dict({name: ours[name] for name in theirs})
    assert same(fresh, gpt2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_saved_model_in_16_bit_stays_so_unless_asked_for(dtype, make_model, tmp_path):
    """As in transformers; our own commands ask for it."""
    make_model("default", torch.float32).save_pretrained(tmp_path)
    RecurGPT2LMHeadModel.from_pretrained(tmp_path, dtype=dtype).save_pretrained(tmp_path / "half")
    for load in (RecurGPT2LMHeadModel, AutoModelForCausalLM):
        loaded = load.from_pretrained(tmp_path / "half")
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
        loaded = load.from_pretrained(tmp_path / "half", dtype=torch.float32)
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert load_any(tmp_path / "half").dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_16_bit_checkpoint_is_widened(dtype, tmp_path):
    random_gpt2().to(dtype).save_pretrained(tmp_path)
    model = RecurGPT2LMHeadModel.from_gpt2(tmp_path, window=WINDOW, last_slots=3)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    gpt2 = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float32)
    ids = random_ids(2, WINDOW)
    assert_close(model(ids).logits, gpt2(ids).logits, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "windowed")
    assert RecurGPT2LMHeadModel.from_pretrained(tmp_path / "windowed").dtype == torch.float32


def test_the_embeddings_can_be_resized_and_stay_tied(gpt2_folder):
    model = RecurGPT2LMHeadModel.from_gpt2(gpt2_folder, window=WINDOW, last_slots=3, pointer_slots=0)
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
    ids = random_ids(1, 2 * WINDOW)
    before = model(ids).logits
    model.resize_token_embeddings(101)
    after = model(ids).logits
    assert after.shape[-1] == model.config.vocab_size == 101
    assert model.lm_head.weight is model.transformer.wte.weight
    assert_close(after[..., :97], before)


def test_models_are_made_ready_for_use(gpt2_folder, tmp_path):
    model = RecurGPT2LMHeadModel.from_gpt2(gpt2_folder, window=WINDOW, last_slots=3)
    assert not model.training
    assert model.config.architectures == ["RecurGPT2LMHeadModel"]
    assert RecurGPT2Model.from_gpt2(gpt2_folder, window=WINDOW, last_slots=3).config.architectures == ["RecurGPT2Model"]


# ---- the output of a lower layer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [1, 3])
@pytest.mark.parametrize("form", ALL_FORMS)
@torch.no_grad()
def test_a_layer_is_that_hidden_state_in_pieces_too(form, parallel, make_model):
    core, ids = make_model(form).transformer, random_ids(2, 3 * WINDOW + 5)
    expected = core(ids, output_hidden_states=True).hidden_states
    for layer in range(core.config.n_layer + 1):
        state, found = None, []
        for piece in ids.split([2 * WINDOW + 3, WINDOW + 2], dim=1):
            out = core(piece, state=state, layer=layer, parallel_windows=parallel)
            state, found = out.state, [*found, out.last_hidden_state]
        assert_close(torch.cat(found, dim=1), expected[layer])


@torch.no_grad()
def test_layers_above_are_not_computed(make_model):
    core, read = make_model("default").transformer, []
    hooks = [block.mlp.register_forward_hook(lambda *_, n=n: read.append(n)) for n, block in enumerate(core.h)]
    core(random_ids(1, WINDOW), layer=2)
    for hook in hooks:
        hook.remove()
    assert read == [0, 1]


@pytest.mark.parametrize("form", ["default", "t2r, default", "near, default", "none"])
@pytest.mark.parametrize("tokens", [WINDOW, WINDOW + 3, 3])
@torch.no_grad()
def test_a_state_of_fewer_layers_is_refused(form, tokens, make_model):
    core = make_model(form).transformer
    state = core(random_ids(2, tokens), layer=2).state
    assert core(random_ids(2, 2), state=state, layer=1) is not None
    if state.memory or state.window:
        with pytest.raises(InputError, match="fewer layers than the 4"):
            core(random_ids(2, 2), state=state)


@pytest.mark.parametrize("layer", [-1, 5])
def test_a_layer_that_does_not_exist_is_refused(layer, make_model):
    with pytest.raises(InputError, match=f"layer={layer} .*give 0, .* to 4"):
        make_model("default").transformer(random_ids(1, 2), layer=layer)


def test_a_layer_called_by_itself_which_would_read_without_memory_is_refused(make_model):
    model = make_model("default")
    with pytest.raises(InputError, match="cannot be called by itself"):
        model.transformer.h[0](torch.zeros(1, 3, model.config.n_embd))
