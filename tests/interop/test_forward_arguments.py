"""`forward` and `generate` take what GPT-2's take, with the same meaning, or refuse it in one sentence."""

import inspect

import pytest
import torch
from conftest import WINDOW
from torch.testing import assert_close
from transformers import GPT2LMHeadModel

from recur_gpt2 import InputError, RecurGPT2LMHeadModel
from recur_gpt2.models.outputs import CACHE

IDS = torch.arange(1, 3 * WINDOW + 4).remainder(97).view(1, -1).repeat(3, 1) + torch.tensor([[0], [5], [11]])
SHORT = IDS[:, :WINDOW]
LEFT = (torch.arange(IDS.shape[1]) >= torch.tensor([[0], [2], [9]])).long()


def test_every_argument_of_gpt2_is_one_of_ours():
    theirs = inspect.signature(GPT2LMHeadModel.forward).parameters
    ours = inspect.signature(RecurGPT2LMHeadModel.forward).parameters
    named = {name for name, each in theirs.items() if each.kind is not inspect.Parameter.VAR_KEYWORD}
    through_kwargs = {"output_attentions", "output_hidden_states", "return_dict", "num_items_in_batch"}
    assert named | through_kwargs <= ours.keys()


@pytest.mark.parametrize("name", ["default", "yoshida2020", "none"])
def test_a_first_window_gives_what_gpt2_gives_by_every_argument(gpt2_folder, make_model, name):
    gpt2 = GPT2LMHeadModel.from_pretrained(gpt2_folder, attn_implementation="eager").double().eval()
    model, types = make_model(name), SHORT.flip(1)
    mask = (torch.arange(WINDOW) < torch.tensor([[WINDOW], [5], [1]])).long()
    options = {"token_type_ids": types, "attention_mask": mask, "labels": SHORT.masked_fill(mask == 0, -100)}
    options |= {"output_attentions": True, "output_hidden_states": True, "position_ids": torch.arange(WINDOW)[None]}
    expected, out = (each(SHORT, **options) for each in (gpt2, model))
    assert_close(out.loss.float(), expected.loss)  # which is in float32 there
    kept = mask.bool()
    assert_close(out.logits[kept], expected.logits[kept])
    for ours, theirs in zip(out.hidden_states, expected.hidden_states, strict=True):
        assert_close(ours[kept], theirs[kept])
    for ours, theirs in zip(out.attentions, expected.attentions, strict=True):
        assert_close(ours.transpose(1, 2)[kept], theirs.transpose(1, 2)[kept])
    embedded = model(inputs_embeds=model.get_input_embeddings()(SHORT), **options)
    assert_close(embedded.logits, out.logits)


@pytest.mark.parametrize("name", ["default", "all slots, some layers", "pooled above", "none"])
def test_attention_weights_have_memory_first_and_then_the_window(make_model, name):
    """Put back between the values, they give what the layer's heads attended to: here, of the first layer."""
    model = make_model(name)
    out = model(IDS, attention_mask=LEFT, output_attentions=True, output_hidden_states=True, parallel_windows=2)
    for layer, weights in enumerate(out.attentions):
        slots = model.config.memory_slots if layer in model.config.insert_layers else 0
        assert weights.shape == (3, 4, IDS.shape[1], slots + WINDOW)
        assert_close(weights.sum(dim=-1), LEFT[:, None].expand(weights.shape[:3]).to(weights))
    row = IDS[:1]  # without padding: windows begin at its multiples
    weights = model(row, output_attentions=True).attentions[0]
    block = model.transformer.h[0]
    _, _, value = block.project(model(row, output_hidden_states=True).hidden_states[0])
    start, slots = WINDOW, weights.shape[-1] - WINDOW
    attended = block.attn.c_proj((weights[:, :, :WINDOW, slots:] @ value[:, :, :WINDOW]).transpose(1, 2).flatten(2))
    hidden = model(row, output_hidden_states=True).hidden_states
    after = hidden[0][:, :WINDOW] + attended
    assert_close(after + block.mlp(block.ln_2(after)), hidden[1][:, :WINDOW])
    assert bool((weights[:, :, :start, :slots] == 0).all())  # a first window has no memory
    assert not slots or bool((weights[:, :, start:, :slots] > 0).all())


def test_linear_layers_refuse_to_show_weights(make_model):
    with pytest.raises(InputError, match="have linear attention, which has no weights"):
        make_model("t2r, default")(IDS, output_attentions=True)


def test_the_configuration_may_ask_for_hidden_states_attentions_and_tuples(make_model):
    model = make_model("default")
    shown = model(IDS, output_hidden_states=True, output_attentions=True)
    changed = {"output_hidden_states": True, "return_dict": False}
    before = {name: getattr(model.config, name) for name in changed}
    try:
        for name, value in changed.items():
            setattr(model.config, name, value)
        logits, state, hidden_states = model(IDS)
        assert model(IDS, output_hidden_states=False, return_dict=True).hidden_states is None
        read = model.read(IDS[0], progress=False)
    finally:
        for name, value in before.items():
            setattr(model.config, name, value)
    assert read.windows.tolist() == shown.state.windows.tolist()[:1]
    assert_close(logits, shown.logits)
    assert state.windows.tolist() == shown.state.windows.tolist()
    assert_close(hidden_states, shown.hidden_states)
    assert [type(each) for each in model(IDS, return_dict=False)] == [torch.Tensor, type(state)]


def test_embeddings_are_read_in_windows_and_written_on_from_as_ids_are(make_model):
    model = make_model("default", pointer_slots=0)
    embeds = model.get_input_embeddings()(IDS)
    for options in ({}, {"attention_mask": LEFT}):
        assert_close(model(inputs_embeds=embeds, **options).logits, model(IDS, **options).logits)
        written = [
            model.generate(**{name: given}, **options, max_new_tokens=12, do_sample=False, pad_token_id=0)[:, -12:]
            for name, given in {"inputs_embeds": embeds, "input_ids": IDS}.items()
        ]
        assert torch.equal(*written)


def test_the_usual_positions_are_taken_and_others_refused(make_model):
    model, n = make_model("default"), IDS.shape[1]
    expected = model(IDS, attention_mask=LEFT).logits
    counted = (LEFT.cumsum(1) - 1).masked_fill(LEFT == 0, 1)
    for positions in (torch.arange(n), torch.arange(n)[None], counted):
        assert_close(model(IDS, attention_mask=LEFT, position_ids=positions).logits, expected)
    state = model(IDS).state
    model(IDS, state=state, position_ids=n + torch.arange(n)[None])  # counted on
    for positions in (torch.arange(n) + 1, torch.arange(n).flip(0), torch.arange(n).repeat(3, 1).remainder(5)):
        with pytest.raises(InputError, match="position_ids are not 0 to n - 1"):
            model(IDS, position_ids=positions)


@pytest.mark.parametrize("name", ["default", "yoshida2020", "t2r, default"])
def test_documents_joined_in_one_row_are_read_apart(make_model, name):
    model, lengths = make_model(name), [5, 2 * WINDOW + 3, 1, WINDOW]
    documents = [IDS[0, :length] for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    out = model(torch.cat(documents)[None], position_ids=positions, output_hidden_states=True)
    apart = [model(each[None], output_hidden_states=True) for each in documents]
    assert_close(out.logits, torch.cat([each.logits for each in apart], dim=1))
    assert_close(out.hidden_states[2], torch.cat([each.hidden_states[2] for each in apart], dim=1))
    assert out.state.filled.tolist() == [length % WINDOW for length in lengths]


def test_prompts_padded_anywhere_are_gone_on_from_their_last_tokens(make_model):
    model = make_model("default")
    rows = [IDS[0], IDS[1, :5], IDS[2, : WINDOW + 1]]
    right = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    middle = torch.cat((right[:, :3], right[:, :2] * 0, right[:, 3:]), dim=1)
    middle_mask = torch.cat((mask[:, :3], mask[:, :2] * 0, mask[:, 3:]), dim=1)
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    alone = torch.cat([model.generate(row[None], **options)[:, -10:] for row in rows])
    for ids, given in ((right, mask), (middle, middle_mask)):
        assert torch.equal(model.generate(ids, attention_mask=given, **options)[:, -10:], alone)


def test_generation_returns_hidden_states_and_attentions(make_model):
    model = make_model("default")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    out = model.generate(IDS[:1], **options, output_hidden_states=True, output_attentions=True)
    whole = model(out.sequences[:, :-1], output_hidden_states=True, output_attentions=True)
    for step in range(4):
        position = IDS.shape[1] - 1 + step
        assert_close(out.hidden_states[step][-1][:, -1], whole.hidden_states[-1][:, position])
        weights = out.attentions[step][1][:, :, -1]
        assert_close(weights, whole.attentions[1][:, :, position, : weights.shape[-1]])


def test_a_given_number_of_items_divides_the_loss(make_model):
    model = make_model("default")
    scored = LEFT[:, 1:].sum() - 2  # the first token of each padded row has no predecessor
    mean = model(IDS, attention_mask=LEFT, labels=IDS).loss
    for items in (7, torch.tensor(7)):
        assert_close(model(IDS, attention_mask=LEFT, labels=IDS, num_items_in_batch=items).loss, mean * scored / 7)


MODEL_ARGUMENTS = {
    "both": ({"input_ids": IDS, "inputs_embeds": torch.zeros(3, 4, 32)}, "either input_ids or inputs_embeds"),
    "neither": ({}, "either input_ids or inputs_embeds"),
    "narrow embeddings": ({"inputs_embeds": torch.zeros(3, 4, 7)}, "inputs_embeds are 7 wide; give 32"),
    "flat embeddings": ({"inputs_embeds": torch.zeros(3, 4)}, r"hold no tokens; give \(batch, tokens, width\)"),
    "labels": ({"inputs_embeds": torch.zeros(3, 4, 32), "labels": IDS}, "labels have shape"),
    "types": ({"input_ids": IDS, "token_type_ids": SHORT}, "token_type_ids has shape"),
    "additive mask": ({"input_ids": IDS, "attention_mask": (LEFT - 1) * 1e9}, "other numbers than 0, padding, and 1"),
    "4D mask": ({"input_ids": IDS, "attention_mask": torch.ones(3, 1, 4, 4)}, "attention_mask has shape"),
    "cross-attention": ({"input_ids": IDS, "encoder_hidden_states": torch.zeros(3, 4, 32)}, "no cross-attention"),
}


@pytest.mark.parametrize("name", MODEL_ARGUMENTS)
def test_what_cannot_be_read_is_refused_in_one_sentence(make_model, name):
    arguments, message = MODEL_ARGUMENTS[name]
    with pytest.raises(InputError, match=message):
        make_model("default").double()(**arguments)


def test_a_float_mask_of_zeros_and_ones_is_a_mask(make_model):
    model = make_model("default")
    assert_close(model(IDS, attention_mask=LEFT.float()).logits, model(IDS, attention_mask=LEFT).logits)


def test_logits_at_padding_of_a_cached_call_are_those_of_the_token_before(make_model):
    model, mask = make_model("default"), (torch.arange(IDS.shape[1]) < 11).long().expand_as(IDS)
    out = model(IDS, attention_mask=mask, use_cache=True)
    assert out[CACHE].state().windows.tolist() == [1, 1, 1]
    assert_close(out.logits[:, -1], model(IDS[:, :11]).logits[:, -1])
