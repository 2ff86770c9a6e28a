"""slot_initialization.py: any GPT-2 checkpoint is taken, nothing else, and slots start where it reads them well."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from conftest import DATA, WINDOW, random_gpt2
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoTokenizer, BertConfig

from recur_gpt2 import InputError, RecurGPT2LMHeadModel, RecurGPT2Model
from recur_gpt2.models.calibration import SAMPLES, likely_tokens

# ---- checkpoints that are refused ------------------------------------------------------------------------------------


@pytest.fixture
def copy(gpt2_folder, tmp_path):
    """A copy of the checkpoint, to be damaged."""
    for file in gpt2_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def refused(folder, message):
    with pytest.raises(InputError, match=message) as caught:
        RecurGPT2LMHeadModel.from_gpt2(folder, window=WINDOW, last_slots=3)
    assert str(folder) in str(caught.value)


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    refused(tmp_path / "nothing", "no model was found at .*; give a folder with config.json and model.safetensors")


def test_an_empty_folder_is_refused(tmp_path):
    refused(tmp_path, "no model was found")


def test_a_damaged_configuration_is_refused(copy):
    (copy / "config.json").write_text("{")
    refused(copy, "config.json of .* cannot be read")


def test_a_folder_without_weights_is_refused(copy):
    (copy / "model.safetensors").unlink()
    refused(copy, r"the weights of .* cannot be read")


def test_truncated_weights_are_refused(copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(copy, r"the weights of .* cannot be read .*; copy it again")


def test_weights_of_another_size_are_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"n_embd": 64}))
    refused(copy, "cannot be read")


@pytest.mark.parametrize("name", ["transformer.h.2.attn.c_attn.weight", "transformer.wpe.weight"])
def test_weights_that_lack_a_part_are_refused_and_not_made_up(copy, name):
    weights = load_file(copy / "model.safetensors")
    del weights[name]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    refused(copy, name.replace(".", r"\."))


def test_another_architecture_is_refused(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    refused(tmp_path, "is a bert model; give a GPT-2 checkpoint")


def test_a_model_that_has_windows_already_is_refused(make_model, tmp_path):
    make_model("default").save_pretrained(tmp_path)
    refused(tmp_path, "already has windows; load it with from_pretrained instead of from_gpt2")


def test_a_window_beyond_the_models_positions_is_refused(gpt2_folder):
    with pytest.raises(InputError, match="window=65 exceeds the model's 64 positions; use --window 64 or less"):
        RecurGPT2LMHeadModel.from_gpt2(gpt2_folder, window=65)


# ---- slots -----------------------------------------------------------------------------------------------------------


def projections(gpt2, tokens, positions):
    """Mean keys and values (2, H, n, d) of each layer, from transformers' own model."""
    seen = []
    layers = [block.attn.c_attn for block in gpt2.transformer.h]
    hooks = [layer.register_forward_hook(lambda *call: seen.append(call[2])) for layer in layers]
    with torch.no_grad():
        gpt2(tokens, position_ids=positions.expand_as(tokens))
    for hook in hooks:
        hook.remove()
    heads = gpt2.config.n_head
    return [out.mean(0).unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)[1:] for out in seen]


def fitted(folder, **options):
    return RecurGPT2LMHeadModel.from_gpt2(folder, **{"window": WINDOW} | options).double()


SLOTS = [
    {"last_slots": 3},
    {"last_slots": 3, "sink_slots": 2},
    {"last_slots": WINDOW, "sink_slots": 0},
    {"last_slots": 2, "pooled_slots": 2, "insert_layers": [1, 3]},
    {"last_slots": 3, "position_offset": 1},  # fewer positions in front than slots
    {"last_slots": 3, "position_offset": 20},
    {"last_slots": 5, "window": 61},  # the offset is what positions are left
    {"last_slots": 3, "window": 64},  # none are left
    {"last_slots": 3, "window": 64, "sink_slots": 0},
    {"last_slots": 64, "window": 64},  # and more are wanted than there are
    {"last_slots": 3, "position_offset": 0},
]


@pytest.mark.parametrize("options", SLOTS, ids=str)
def test_last_positions_are_shifted_to_look_as_if_in_front_of_the_window(options, gpt2_folder, gpt2):
    model = fitted(gpt2_folder, **options)
    config = model.config
    last, offset, end = config.last_slots, config.position_offset, config.position_offset + config.window
    tokens = likely_tokens(model.transformer, (SAMPLES, end))
    at_end = projections(gpt2, tokens, torch.arange(end))
    first = offset - last if offset > last else min(config.sink_slots, 1)  # behind the sink, with or without room
    in_front = torch.tensor([0] + [min(first + slot, 63) for slot in range(last)])
    at_front = projections(gpt2, torch.cat((tokens[:, :1], tokens[:, -last:]), dim=1), in_front)
    for layer in config.insert_layers:
        memory = model.transformer.recurrence.get(str(layer))
        shift = memory.shift[:, :, config.pooled_slots :]
        assert_close(shift, at_front[layer][:, :, 1:] - at_end[layer][:, :, -last:], rtol=1e-4, atol=1e-4)
        assert shift.abs().max() > 0.1


@pytest.mark.parametrize(
    "options",
    [*SLOTS, {"last_slots": 0}, {"last_slots": 0, "sink_slots": 3, "pooled_slots": 1}],
    ids=str,
)
def test_sinks_start_as_gpt2s_first_position(options, gpt2_folder, gpt2):
    model = fitted(gpt2_folder, **options)
    tokens = likely_tokens(model.transformer, (SAMPLES, model.config.position_offset + model.config.window))
    first = projections(gpt2, tokens[:, :1], torch.zeros(1, dtype=torch.int64))
    for layer in model.config.insert_layers:
        sink = model.transformer.recurrence.get(str(layer)).sink
        if sink is None:
            assert not model.config.sink_slots
            continue
        assert_close(sink, first[layer].expand_as(sink), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("insert_layers", [[0], [2], [1, 3]])
def test_embeddings_that_a_net_writes_start_as_gpt2s_first_position(insert_layers, gpt2_folder, gpt2):
    options = {"recurrence": "yoshida2020", "insert_layers": insert_layers, "pooled_slots": 2}
    model = fitted(gpt2_folder, **options)
    tokens = likely_tokens(model.transformer, (SAMPLES, 1))
    with torch.no_grad():
        inputs = gpt2(tokens, output_hidden_states=True).hidden_states
    wanted = torch.stack([inputs[layer].mean(dim=(0, 1)) for layer in insert_layers]).mean(dim=0)
    bias = model.transformer.recurrence.get("pooled").net[-1].bias
    assert_close(bias.view(2, -1), wanted.expand(2, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recurrence", ["default", "yoshida2020", "none"])
def test_the_same_checkpoint_gives_the_same_model(gpt2_folder, recurrence):
    options = {"window": WINDOW, "recurrence": recurrence} | ({"last_slots": 3} if recurrence == "default" else {})
    torch.manual_seed(0)
    first = RecurGPT2LMHeadModel.from_gpt2(gpt2_folder, **options).state_dict()
    torch.manual_seed(0)
    second = RecurGPT2LMHeadModel.from_gpt2(gpt2_folder, **options).state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_the_model_without_a_head_starts_the_same(gpt2_folder):
    whole = fitted(gpt2_folder, last_slots=3).transformer.state_dict()
    headless = RecurGPT2Model.from_gpt2(gpt2_folder, window=WINDOW, last_slots=3).double().state_dict()
    assert whole.keys() == headless.keys()
    assert all(torch.equal(tensor, headless[name]) for name, tensor in whole.items())


def test_likely_tokens_follow_the_models_own_frequencies(tmp_path):
    """A head that favours a few tokens: they are drawn most."""
    gpt2 = random_gpt2()
    with torch.no_grad():
        gpt2.transformer.ln_f.bias.normal_()
    gpt2.save_pretrained(tmp_path)
    model = RecurGPT2LMHeadModel.from_gpt2(tmp_path, window=WINDOW, recurrence="none")
    with torch.no_grad():
        context = torch.cartesian_prod(torch.arange(97), torch.arange(97))
        expected = gpt2(context).logits[:, -1].softmax(dim=-1).mean(dim=0)
        drawn = likely_tokens(model.transformer, (100, 100)).flatten().bincount(minlength=97) / 100**2
    assert torch.corrcoef(torch.stack((expected, drawn)))[0, 1] > 0.8


# ---- on a real GPT-2 -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def book():
    """Two thousand tokens from the middle of a validation book."""
    text = pq.read_table(DATA / "pg19-sample" / "validation.parquet", columns=["text"])["text"][0].as_py()
    tokenizer = AutoTokenizer.from_pretrained(DATA / "gpt2-mini")
    return torch.tensor([tokenizer(text[20_000:40_000])["input_ids"][:2048]])


@torch.no_grad()
def nats(book, **options):
    model = RecurGPT2LMHeadModel.from_gpt2(DATA / "gpt2-mini", **{"window": 64} | options)
    return float(model(book, labels=book, parallel_windows=8).loss)


@torch.no_grad()
def test_a_window_of_all_positions_loses_little_before_any_training(book):
    """Slots that still say "the end" would: the queries have never seen such keys in front of them."""
    model = RecurGPT2LMHeadModel.from_gpt2(DATA / "gpt2-mini", window=1024)
    fitted = float(model(book, labels=book).loss)
    recurrence = model.transformer.recurrence
    for name in recurrence.names():
        recurrence.get(name).shift.zero_()
    assert fitted < nats(book, window=1024, recurrence="none") + 0.15
    assert fitted < float(model(book, labels=book).loss) - 0.5


def test_before_any_training_memory_already_predicts_better_than_windows_apart(book):
    apart = nats(book, recurrence="none")
    assert nats(book) < apart
    assert nats(book, last_slots=0) < apart + 0.1  # sinks know no document, but do hardly any harm


@pytest.mark.parametrize("window", [64, 256])
def test_a_net_not_trained_yet_does_hardly_any_harm(book, window):
    apart = nats(book, window=window, recurrence="none")
    assert nats(book, window=window, recurrence="yoshida2020") < apart + 0.01


def test_misspelled_options_are_refused(gpt2_folder):
    with pytest.raises(InputError, match=r"last_slot.*last_slots"):
        RecurGPT2LMHeadModel.from_gpt2(gpt2_folder, window=8, last_slot=4)


# ---- new parameters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"pooled_slots": 2}, {"recurrence": "yoshida2020"}], ids=str)
def test_a_model_starts_the_same_each_time_and_leaves_the_random_numbers_alone(options, gpt2_folder):
    torch.manual_seed(1)
    first = RecurGPT2LMHeadModel.from_gpt2(gpt2_folder, window=WINDOW, **options)
    drawn = torch.rand(3)
    second = RecurGPT2LMHeadModel.from_gpt2(gpt2_folder, window=WINDOW, **options)
    assert_close(second.state_dict(), first.state_dict(), rtol=0, atol=0)
    torch.manual_seed(1)
    assert_close(torch.rand(3), drawn, rtol=0, atol=0)
