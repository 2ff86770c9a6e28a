"""configuration.py: presets fill in what is left out, a saved configuration is complete, nonsense is refused."""

import pytest
from transformers import AutoConfig, GPT2Config

from recur_gpt2 import InputError, RecurGPT2Config
from recur_gpt2.models import configuration
from recur_gpt2.models.flops import flops_per_token

SIZES = {"n_layer": 6, "n_embd": 32, "n_head": 4, "vocab_size": 97, "n_positions": 128}
RECURRENCE = ("insert_layers", "pool_layers", "sink_slots", "last_slots", "pooled_slots", "position_offset")


def make(**options):
    return RecurGPT2Config(**SIZES | {"window": 64} | options)


def recurrence(config):
    return {field: getattr(config, field) for field in RECURRENCE}


# ---- presets ---------------------------------------------------------------------------------------------------------


def test_the_paper_inserts_one_slot_in_the_middle_made_from_the_top():
    config = make(recurrence="yoshida2020")
    assert (config.insert_layers, config.pool_layers, config.memory_slots) == ([3], [5], 1)
    assert (config.position_offset, config.recurrence_width) == (0, 200)


def test_the_default_gives_every_layer_memory_of_its_own():
    config = make()
    assert config.recurrence == "default"
    assert config.insert_layers == list(range(6))
    assert config.pool_layers == []
    assert config.memory_slots == config.sink_slots + config.last_slots + config.pooled_slots > 1


def test_none_has_no_memory():
    config = make(recurrence="none")
    assert (config.insert_layers, config.pool_layers, config.memory_slots, config.position_offset) == ([], [], 0, 0)


@pytest.mark.parametrize("preset", configuration.PRESETS)
@pytest.mark.parametrize("field", ["sink_slots", "last_slots", "pooled_slots"])
@pytest.mark.parametrize("value", [0, 1])
def test_what_the_caller_says_goes_before_the_preset(preset, field, value):
    options = {"pool_layers": [], field: value}
    assert getattr(make(recurrence=preset, **options), field) == value


def test_layers_and_offset_of_the_caller_go_before_the_preset():
    config = make(insert_layers=[4, 1], position_offset=7)
    assert (config.insert_layers, config.position_offset) == ([4, 1], 7)
    config = make(recurrence="yoshida2020", insert_layers=[0, 1], pool_layers=[2, 3], pooled_slots=4)
    assert (config.insert_layers, config.pool_layers, config.memory_slots) == ([0, 1], [2, 3], 4)


@pytest.mark.parametrize(
    ("window", "last_slots", "offset"),
    [(64, 32, 33), (96, 32, 32), (120, 32, 8), (128, 32, 0), (64, 0, 0)],
)
def test_windows_are_shifted_by_what_stands_before_them_as_far_as_positions_reach(window, last_slots, offset):
    assert make(window=window, last_slots=last_slots, sink_slots=1).position_offset == offset


# ---- saved configurations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", configuration.PRESETS)
def test_a_saved_configuration_comes_back_the_same(preset, tmp_path):
    config = make(recurrence=preset, recurrence_width=50)
    config.save_pretrained(tmp_path)
    for loaded in (RecurGPT2Config.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is RecurGPT2Config
        assert recurrence(loaded) == recurrence(config)
        assert (loaded.window, loaded.recurrence, loaded.recurrence_width) == (64, preset, 50)


@pytest.mark.parametrize("preset", configuration.PRESETS)
def test_a_saved_configuration_outlives_a_change_of_its_preset(preset, tmp_path, monkeypatch):
    config = make(recurrence=preset)
    config.save_pretrained(tmp_path)
    other = {"sink_slots": 5, "last_slots": 6, "pooled_slots": 7}
    monkeypatch.setattr(configuration, "PRESETS", configuration.PRESETS | {preset: other})
    assert recurrence(RecurGPT2Config.from_pretrained(tmp_path)) == recurrence(config)


def test_it_is_a_gpt2_configuration_with_gpt2s_own_fields():
    config = make(activation_function="relu", n_inner=48)
    assert isinstance(config, GPT2Config)
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("recur_gpt2", 32, 6)
    assert (config.activation_function, config.n_inner, config.tie_word_embeddings) == ("relu", 48, True)


# ---- refusals: the value, the limit, the way out ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 129}, "window=129 exceeds the model's 128 positions; use --window 128 or less"),
        ({"window": 1}, "window=1 must be at least 2"),
        ({"recurrence": "lstm"}, "recurrence='lstm' is not known; use one of default, yoshida2020, none"),
        ({"insert_layers": [6]}, r"insert_layers=\[6\] must be distinct layers from 0 to 5"),
        ({"insert_layers": [-1]}, r"insert_layers=\[-1\] must be distinct layers"),
        ({"insert_layers": [2, 2]}, r"insert_layers=\[2, 2\] must be distinct layers"),
        ({"recurrence": "yoshida2020", "pool_layers": [7]}, r"pool_layers=\[7\] must be distinct layers"),
        ({"sink_slots": -1}, "sink_slots=-1 must be no less than 0"),
        ({"last_slots": -2}, "last_slots=-2 must be no less than 0"),
        ({"pooled_slots": -3}, "pooled_slots=-3 must be no less than 0"),
        ({"last_slots": 65}, "last_slots=65 exceeds window=64; use 64 or less"),
        ({"pool_layers": [5]}, r"pool_layers=\[5\] .* sink_slots=1 or last_slots=\d+; set those to 0"),
        ({"recurrence": "yoshida2020", "insert_layers": []}, r"pool_layers=\[5\] needs at least one layer"),
        ({"recurrence": "yoshida2020", "pooled_slots": 0}, r"pool_layers=\[5\] .* pooled_slots=0"),
        ({"recurrence": "yoshida2020", "recurrence_width": 0}, "recurrence_width=0 must be at least 1"),
        ({"position_offset": -1}, "position_offset=-1 must be from 0 to n_positions - window = 64"),
        ({"position_offset": 65}, "position_offset=65 must be from 0 to n_positions - window = 64"),
    ],
)
def test_a_contradiction_is_refused_with_the_way_out(options, message):
    with pytest.raises(InputError, match=message):
        make(**options)


@pytest.mark.parametrize("options", [{"window": 128}, {"window": 2, "last_slots": 2}, {"position_offset": 64}])
def test_the_borders_are_allowed(options):
    make(**options)


GPT2_SMALL = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}
MINI = {"n_layer": 6, "n_embd": 256, "n_head": 4, "vocab_size": 8192, "n_positions": 1024}


def cost(config):
    """Of all memory but for writing pooled slots, as a part of a window without it."""
    without = RecurGPT2Config(**config.to_dict() | {"pointer_slots": 0})
    writing = flops_per_token(without, memory=False) - config.plain_flops
    return (flops_per_token(config) - writing) / config.plain_flops - 1


@pytest.mark.parametrize("window", [64, 128, 256, 512, 1024])
@pytest.mark.parametrize("options", [GPT2_SMALL, MINI, MINI | {"pooled_slots": 4}, MINI | {"insert_layers": [0, 3]}])
def test_the_default_has_the_last_slots_that_two_percent_pay_for_up_to_a_window(options, window):
    config = RecurGPT2Config(**options, window=window)
    one_more = RecurGPT2Config(**options, window=window, last_slots=min(config.last_slots + 1, window))
    assert cost(config) <= 0.02
    assert config.last_slots == window or cost(one_more) > 0.0199


def test_the_default_fits_windows_shorter_than_its_slots():
    assert RecurGPT2Config(**MINI, window=8).last_slots == 8
