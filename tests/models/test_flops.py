"""flops.py: FLOPs as torch's own counter counts them, memory and time as they are."""

import sys
import time
from math import prod

import pytest
import torch
from helpers_training import gpt2_of, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from recur_gpt2 import RecurGPT2Config, RecurGPT2LMHeadModel
from recur_gpt2.models import flops
from recur_gpt2.models.flops import flops_per_token
from recur_gpt2.models.state import RecurState
from recur_gpt2.ops import softmax
from recur_gpt2.ops.cross_entropy import summed_loss
from recur_gpt2.ops.feature_maps import FEATURE_MAPS, T2R
from recur_gpt2.utils import measure
from recur_gpt2.utils.measure import Meter, peak_resident, weight_bytes

MB = 2**20
# data/gpt2-mini's
MINI = {"n_layer": 6, "n_embd": 256, "n_head": 4, "vocab_size": 8192, "n_positions": 1024}
BASE = {"n_layer": 3, "n_embd": 64, "n_head": 4, "vocab_size": 256, "n_positions": 256, "window": 64}
GRID = {
    "default": {"last_slots": 16},
    "default, another offset": {"last_slots": 16, "position_offset": 5},
    "default, one layer": {"n_layer": 1, "last_slots": 8},
    "default, five layers": {"n_layer": 5, "last_slots": 8},
    "default, wide": {"n_embd": 128, "last_slots": 8},
    "default, large vocabulary": {"vocab_size": 4096, "last_slots": 8},
    "default, n_inner": {"n_inner": 96, "last_slots": 16},
    "default, short windows": {"window": 16, "last_slots": 8},
    "default, long windows": {"window": 200, "last_slots": 32},
    "default, two layers of three": {"insert_layers": [0, 2], "last_slots": 16},
    "a sink alone": {"sink_slots": 4, "last_slots": 0},
    "last positions alone": {"sink_slots": 0, "last_slots": 20},
    "pooled slots alone": {"sink_slots": 0, "last_slots": 0, "pooled_slots": 8},
    "pooled slots in one layer": {"sink_slots": 0, "last_slots": 0, "pooled_slots": 8, "insert_layers": [1]},
    "all kinds of slots": {"sink_slots": 2, "last_slots": 7, "pooled_slots": 5},
    "yoshida2020": {"recurrence": "yoshida2020"},
    "yoshida2020, short windows": {"recurrence": "yoshida2020", "window": 8},
    "yoshida2020, narrow net": {"recurrence": "yoshida2020", "recurrence_width": 24, "pooled_slots": 3},
    "yoshida2020, pooled from two": {"recurrence": "yoshida2020", "pool_layers": [1, 2], "insert_layers": [1]},
    "yoshida2020, pooled below": {"recurrence": "yoshida2020", "pool_layers": [0], "insert_layers": [2]},
    "yoshida2020, into two": {"recurrence": "yoshida2020", "insert_layers": [0, 2], "pooled_slots": 2},
    "yoshida2020, into all": {"recurrence": "yoshida2020", "insert_layers": [0, 1, 2], "window": 16},
    "none": {"recurrence": "none"},
    "none, long windows": {"recurrence": "none", "window": 256},
    "t2r": {"recurrence": "none", "linear_layers": "all", "window": 256},
    "t2r, windows of less than a chunk": {"recurrence": "none", "linear_layers": "all", "window": 32},
    "t2r, many features": {"recurrence": "none", "linear_layers": [1], "feature_size": 48, "window": 128},
    "hedgehog, default": {"last_slots": 16, "linear_layers": [0, 2], "feature_map": "hedgehog", "feature_size": 64},
    "elu, pooled slots": {"last_slots": 0, "pooled_slots": 4, "linear_layers": "all", "feature_map": "elu"},
    "rfa, default": {"last_slots": 16, "linear_layers": "all", "feature_map": "rfa"},
    "near": {"recurrence": "none", "linear_layers": "all", "near_tokens": 16},
    "near, not a divisor": {"recurrence": "none", "linear_layers": [0, 2], "near_tokens": 24, "window": 100},
    "near, longer than a chunk": {"recurrence": "none", "linear_layers": "all", "near_tokens": 48, "window": 128},
    "near, default": {"last_slots": 20, "linear_layers": "all", "feature_map": "hedgehog", "near_tokens": 8},
    "near, yoshida2020": {"recurrence": "yoshida2020", "linear_layers": "all", "feature_map": "elu", "near_tokens": 4},
    "t2r, yoshida2020": {"recurrence": "yoshida2020", "linear_layers": "all"},
}
grid = pytest.mark.parametrize("options", GRID.values(), ids=GRID.keys())


def model_of(options):
    torch.manual_seed(0)
    return RecurGPT2LMHeadModel(RecurGPT2Config(**BASE | {"bos_token_id": 0, "eos_token_id": 0} | options))


def read_window(model, state):
    """One full window, with the memory of the one before if there is one, and its logits. -> logits, next state"""
    ids = torch.randint(1, model.config.vocab_size, (2, 1, model.config.window))
    starts = torch.full((2, 1), state is None)
    hidden, _, state = model.read_windows(ids, ids, starts, state)
    return model.lm_head(hidden), state


@pytest.fixture(autouse=True)
def whole_rectangles(monkeypatch):
    """Attention in steps would leave out most of what lies in the future, which counts too."""
    for name in ("QUERIES", "QUERIES_WITHOUT_GRADIENT"):
        monkeypatch.setattr(softmax, name, 2**20)


def counted(run):
    """FLOPs as torch counts them; the fused CPU attention would count as none, and so would baddbmm in place."""
    in_place = {torch.ops.aten.baddbmm_: lambda _, left, right, **options: 2 * prod(left) * right[-1]}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        run()
    return counter.get_total_flops()


# ---- FLOPs -----------------------------------------------------------------------------------------------------------


@grid
@torch.no_grad()
def test_flops_of_a_window_with_memory_are_those_that_torch_counts(options):
    model = model_of(options)
    _, state = read_window(model, None)
    flops = counted(lambda: read_window(model, state)) / (2 * model.config.window)
    assert flops_per_token(model.config) == pytest.approx(flops, rel=0.01)


@grid
@torch.no_grad()
def test_flops_of_a_window_without_memory_are_those_that_torch_counts(options):
    """It writes memory all the same, for the window behind it."""
    model = model_of(options)
    flops = counted(lambda: read_window(model, None)) / (2 * model.config.window)
    assert flops_per_token(model.config, memory=False) == pytest.approx(flops, rel=0.01)


@torch.no_grad()
def test_a_model_without_recurrence_takes_what_transformers_own_takes():
    model = model_of(GRID["none"])
    ids = torch.randint(1, model.config.vocab_size, (2, model.config.window))
    flops = counted(lambda: gpt2_of(model)(ids)) / (2 * model.config.window)
    assert (
        flops_per_token(model.config) == flops_per_token(model.config, memory=False) == pytest.approx(flops, rel=1e-3)
    )


@grid
def test_training_takes_three_times_as_many(options):
    model = model_of(options).train()
    _, state = read_window(model, None)

    def step():
        """Memory comes from the window before, in the same graph, as within a segment."""
        ids = torch.randint(1, model.config.vocab_size, (2, 4, model.config.window))
        starts = torch.zeros(2, 4, dtype=torch.bool)
        hidden, _ = model.transformer.forward_windows(ids, starts, state.detach())
        summed_loss(hidden, model.lm_head.weight, ids).backward()

    flops = counted(step) / (8 * model.config.window)
    assert flops_per_token(model.config, training=True) == pytest.approx(flops, rel=0.04)
    if not model.config.linear_layers:
        assert flops_per_token(model.config, training=True) == 3 * flops_per_token(model.config)


@pytest.mark.parametrize("window", [64, 128, 256])
@pytest.mark.parametrize("recurrence", ["default", "yoshida2020"])
def test_the_recurrence_of_gpt2_mini_costs_under_two_percent(recurrence, window):
    config = RecurGPT2Config(**MINI, window=window, recurrence=recurrence, bos_token_id=0, eos_token_id=0)
    with_memory, without = flops_per_token(config), flops_per_token(config, memory=False)
    assert without < with_memory < 1.02 * without


@torch.no_grad()
def test_several_windows_at_once_take_no_more():
    """The scan over windows is not counted by the formula: it must stay negligible."""
    model = model_of(GRID["all kinds of slots"])
    _, state = read_window(model, None)

    def read():
        ids = torch.randint(1, 256, (2, 8, model.config.window))
        model.lm_head(model.transformer.forward_windows(ids, torch.zeros(2, 8, dtype=torch.bool), state)[0])

    assert flops_per_token(model.config) == pytest.approx(counted(read) / (16 * model.config.window), rel=0.01)


# ---- memory and time -------------------------------------------------------------------------------------------------

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak since a moment")


@linux_only
@pytest.mark.parametrize("size", [50, 200])
def test_the_peak_grows_by_a_tensor_that_was_allocated_inside(size):
    model = tiny_model()
    with Meter(model) as measured:
        tensor = torch.ones(size * MB // 4)
        del tensor
    assert measured.peak_memory_bytes == pytest.approx(size * MB + weight_bytes(model), rel=0.1)


@linux_only
def test_the_peak_is_not_that_of_an_earlier_moment():
    """What was used and freed before, and what is held since before, both count for nothing."""
    earlier = torch.ones(300 * MB // 4)
    del earlier
    held = torch.ones(100 * MB // 4)
    with Meter(tiny_model()) as measured:
        torch.ones(30 * MB // 4)
    assert measured.peak_memory_bytes == pytest.approx(30 * MB, abs=8 * MB)
    assert len(held) == 25 * MB
    with Meter(tiny_model()) as measured:
        pass
    assert measured.peak_memory_bytes < 8 * MB


@linux_only
def test_the_peak_of_the_process_covers_what_it_holds():
    tensor = torch.ones(100 * MB // 4)
    assert peak_resident() > tensor.nbytes


def test_the_peak_is_none_where_it_cannot_be_measured(monkeypatch):
    def refused(*args, **kwargs):
        raise PermissionError

    monkeypatch.setattr(measure.Path, "write_text", refused)
    with Meter(tiny_model()) as measured:
        time.sleep(0.01)
    assert measured.peak_memory_bytes is None
    assert measured.seconds > 0


def test_seconds_are_those_spent_inside():
    time.sleep(0.2)
    began = time.perf_counter()
    with Meter(tiny_model()) as measured:
        time.sleep(0.05)
    outside = time.perf_counter() - began
    assert 0.05 <= measured.seconds <= outside


def test_what_fails_inside_is_measured_too():
    meter = Meter(tiny_model())
    with pytest.raises(MemoryError), meter:
        raise MemoryError
    assert meter.result.seconds > 0


def test_tied_weights_are_counted_once():
    model = tiny_model()
    assert weight_bytes(model) == 4 * sum(parameter.numel() for parameter in model.parameters())
    untied = tiny_model(tie_word_embeddings=False)
    assert weight_bytes(untied) == weight_bytes(model) + 4 * 97 * 32


def test_states_do_not_grow_with_the_document():
    """What is carried, and so what is counted, is a matter of the configuration alone."""
    model = tiny_model("pooled")
    with torch.no_grad():
        sizes = {model(torch.ones(1, 8 * windows, dtype=torch.int64)).state.nbytes for windows in (1, 2, 9)}
    assert len(sizes) == 1
    assert sizes.pop() > RecurState.empty(1).nbytes


def test_what_a_feature_map_costs_is_asked_of_the_map(monkeypatch):
    """One that was added elsewhere is counted like those that are here."""

    class Wider(T2R):
        @classmethod
        def sizes(cls, width, feature_size):
            return 2 * feature_size, 3

    options = BASE | {"recurrence": "none", "linear_layers": "all"}
    monkeypatch.setitem(FEATURE_MAPS, "wider", Wider)
    assert flops.head_features(RecurGPT2Config(**options, feature_map="wider", feature_size=8)) == (16, 16, 3)
    assert flops_per_token(RecurGPT2Config(**options, feature_map="wider")) > 0
