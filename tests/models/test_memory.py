"""memory.py: what one window leaves for the next equals a loop over windows, documents' starts included."""

import naive
import pytest
import torch
from conftest import perturb
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from recur_gpt2 import RecurGPT2Config
from recur_gpt2.models.memory import LayerMemory, PooledMemory, Recurrence, gated_scan
from recur_gpt2.utils.tensors import widen

SIZES = {"n_layer": 4, "n_embd": 12, "n_head": 3, "vocab_size": 97, "n_positions": 64, "window": 6}
SLOTS = {
    "last": {"sink_slots": 0, "last_slots": 2, "pooled_slots": 0},
    "sinks and last": {"sink_slots": 2, "last_slots": 3, "pooled_slots": 0},
    "pooled": {"sink_slots": 0, "last_slots": 0, "pooled_slots": 2},
    "all": {"sink_slots": 1, "last_slots": 2, "pooled_slots": 3},
    "sinks": {"sink_slots": 2, "last_slots": 0, "pooled_slots": 0},
    "whole window": {"sink_slots": 0, "last_slots": 6, "pooled_slots": 1},
}
# Windows that continue the one before, by row: documents' starts at the segment's start, inside it, and side by side.
CONTINUES = [[True, True, True, True], [False, True, True, True], [True, False, True, False], [False] * 4]


def layer_memory(slots="all", dtype=torch.float64):
    return perturb(LayerMemory(RecurGPT2Config(**SIZES | SLOTS[slots])).to(dtype), std=0.5)


def random_windows(seed=0, rows=4, windows=4, length=6):
    """Keys and values (B, W, H, T, d)."""
    torch.manual_seed(seed)
    return torch.randn(2, rows, windows, 3, length, 4, dtype=torch.float64).unbind(0)


def written_naively(memory, key, value, previous, continues):
    rows = []
    for row, flags in enumerate(continues):
        raw, each = None if previous is None else previous[row], []
        for window, flag in enumerate(flags):
            raw = naive.write_layer_memory(memory, key[row, window], value[row, window], raw if flag else None)
            each.append(raw)
        rows.append(torch.stack(each))
    return torch.stack(rows)


# ---- a layer's memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("carried", [True, False])
def test_writing_equals_a_loop_over_windows(slots, carried):
    memory = layer_memory(slots)
    key, value = random_windows()
    previous = memory.empty(4, key).normal_() if carried else None
    continues = CONTINUES if carried else [[False, *flags[1:]] for flags in CONTINUES]
    ours = memory.write(key, value, previous, torch.tensor(continues))
    assert_close(ours, written_naively(memory, key, value, previous, continues))


def test_writing_window_by_window_equals_writing_at_once():
    memory = layer_memory()
    key, value = random_windows()
    flags = torch.tensor(CONTINUES)
    flags[:, 0] = False
    at_once, before = memory.write(key, value, None, flags), None
    for window in range(4):
        here = slice(window, window + 1)
        before = memory.write(key[:, here], value[:, here], before, flags[:, here])[:, 0]
        assert_close(before, at_once[:, window])


def test_a_new_document_knows_nothing_of_the_one_before():
    memory = layer_memory()
    key, value = random_windows()
    flags = torch.tensor([[False, True, False, True]] * 4)
    before = memory.write(key, value, None, flags)
    after = memory.write(key.clone().index_fill_(1, torch.tensor([0, 1]), 9.0), value, None, flags)
    assert_close(after[:, 2:], before[:, 2:], rtol=1e-12, atol=1e-12)
    assert not torch.equal(after[:, :2], before[:, :2])


@pytest.mark.parametrize("bias", [-500.0, -40.0, 40.0, 500.0])
def test_gates_wide_open_or_shut_carry_everything_or_nothing(bias):
    memory = layer_memory("pooled")
    with torch.no_grad():
        memory.gate_bias.fill_(bias)
    key, value = random_windows()
    previous = memory.empty(4, key).normal_()
    ours = memory.write(key, value, previous, torch.tensor(CONTINUES))
    assert torch.isfinite(ours).all()
    assert_close(ours, written_naively(memory, key, value, previous, CONTINUES))
    if bias > 0:
        assert_close(ours[0], previous[0].expand_as(ours[0]))  # this row's document never starts anew
    else:
        assert_close(ours, memory.write(key, value, None, torch.zeros(4, 4, dtype=torch.bool)))


@pytest.mark.parametrize("slots", SLOTS)
def test_reading_puts_sinks_first_and_shifts_the_rest(slots):
    memory = layer_memory(slots)
    raw = torch.randn(2, 5, *memory.empty(1, torch.zeros((), dtype=torch.float64)).shape[1:], dtype=torch.float64)
    key, value = memory.read(raw)
    assert key.shape == value.shape == (2, 5, 3, sum(SLOTS[slots].values()), 4)
    for row in range(2):
        for window in range(5):
            assert_close((key[row, window], value[row, window]), naive.read_layer_memory(memory, raw[row, window]))


def test_a_new_memory_pools_about_the_mean_and_carries_half():
    memory = LayerMemory(RecurGPT2Config(**SIZES | SLOTS["pooled"])).double()
    key, value = random_windows()
    written = memory.write(key, value, None, torch.tensor([[False, True, True, True]] * 4))
    mean = torch.stack((key.mean(dim=-2), value.mean(dim=-2)), dim=2)
    fresh = memory.write(key, value, None, torch.zeros(4, 4, dtype=torch.bool))
    assert_close(fresh, mean.unsqueeze(-2).expand_as(fresh), rtol=0, atol=0.2)
    assert_close(written[:, 1], (fresh[:, 0] + fresh[:, 1]) / 2)


@pytest.mark.parametrize("slots", SLOTS)
def test_everything_learned_gets_a_gradient(slots):
    memory = layer_memory(slots)
    key, value = random_windows()
    raw = memory.write(key, value, None, torch.tensor([[False, True, True, True]] * 4))
    read_key, read_value = memory.read(raw)
    used = {name: parameter for name, parameter in memory.named_parameters() if parameter.numel()}
    gradients = torch.autograd.grad((read_key * read_value.cos()).sum(), used.values())
    assert all(gradient.abs().min() > 0 for gradient in gradients)


def test_what_is_learned_on_reading_gets_its_gradient_from_detached_memory():
    memory = layer_memory("sinks and last")
    key, value = random_windows()
    raw = memory.write(key, value, None, torch.zeros(4, 4, dtype=torch.bool)).detach()
    read_key, read_value = memory.read(raw)
    gradients = torch.autograd.grad((read_key * read_value.cos()).sum(), [memory.sink, memory.shift])
    assert all(gradient.abs().min() > 0 for gradient in gradients)


# ---- the scan --------------------------------------------------------------------------------------------------------


def scan_by_loop(fresh, gate, first, has_memory):
    rows = []
    for row in range(len(fresh)):
        each = []
        before = None if first is None else first[row]
        for window in range(fresh.shape[1]):
            g, u = gate[row, window, None, :, :, None], fresh[row, window]
            before = g * before + (1 - g) * u if has_memory[row, window] else u
            each.append(before)
        rows.append(torch.stack(each))
    return torch.stack(rows)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_scan_equals_a_loop(data):
    rows, windows = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    dtype, tolerance = data.draw(st.sampled_from([(torch.float64, 1e-9), (torch.float32, 2e-4)]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    numbers = st.floats(0, 1, width=32) | st.sampled_from([0.0, 1.0, 1e-30, 0.5])
    size = rows * windows * 2
    gate = torch.tensor(data.draw(st.lists(numbers, min_size=size, max_size=size)), dtype=dtype)
    gate = gate.view(rows, windows, 2, 1).expand(-1, -1, -1, 3)
    flags = data.draw(st.lists(st.booleans(), min_size=rows * windows, max_size=rows * windows))
    has_memory = torch.tensor(flags).view(rows, windows)
    first = torch.randn(rows, 2, 2, 3, 4, dtype=dtype)
    if data.draw(st.booleans()):
        first, has_memory[:, 0] = None, False
    fresh = torch.randn(rows, windows, 2, 2, 3, 4, dtype=dtype)
    expected = scan_by_loop(fresh.double(), gate.double(), None if first is None else first.double(), has_memory)
    ours = gated_scan(fresh, gate, first, has_memory)
    assert ours.dtype == dtype
    assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)


def test_a_long_scan_of_small_gates_stays_exact():
    torch.manual_seed(0)
    fresh, gate = torch.randn(1, 300, 2, 2, 3, 4), torch.full((1, 300, 2, 3), 0.02)
    has_memory = torch.ones(1, 300, dtype=torch.bool)
    first = torch.randn(1, 2, 2, 3, 4)
    expected = scan_by_loop(fresh.double(), gate.double(), first.double(), has_memory)
    assert_close(gated_scan(fresh, gate, first, has_memory).double(), expected, rtol=1e-3, atol=1e-3)


def test_the_scans_gradients_equal_those_of_a_loop():
    torch.manual_seed(0)
    fresh = torch.randn(4, 4, 2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    gate = torch.rand(4, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    first = torch.randn(4, 2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    inputs = fresh, gate, first
    ours, expected = (
        torch.autograd.grad((scan(*inputs, torch.tensor(CONTINUES)) ** 3).sum(), inputs)
        for scan in (gated_scan, scan_by_loop)
    )
    assert_close(ours, expected)
    assert not ours[2][1].any()  # a row whose document starts here needs no memory from before


def test_a_scan_in_16_bit_sums_in_32():
    torch.manual_seed(0)
    fresh = torch.randn(2, 50, 2, 2, 3, 4).bfloat16()
    gate, has_memory = torch.full((2, 50, 2, 3), 0.9), torch.ones(2, 50, dtype=torch.bool)
    first = torch.randn(2, 2, 2, 3, 4).bfloat16()
    expected = scan_by_loop(fresh.double(), gate.double(), first.double(), has_memory)
    with torch.autocast("cpu", torch.bfloat16):
        ours = gated_scan(fresh, gate, first, has_memory)
    assert ours.dtype == torch.bfloat16
    assert_close(ours.double(), expected, rtol=2**-8, atol=1e-3)


# ---- pooled memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 3])
def test_pooled_memory_is_the_net_of_the_mixed_means(slots):
    options = {"recurrence": "yoshida2020", "pooled_slots": slots, "pool_layers": [1, 3]}
    memory = perturb(PooledMemory(RecurGPT2Config(**SIZES | options)).double())
    raw = torch.randn(2, 5, 2, 12, dtype=torch.float64)
    out = memory.read(raw)
    assert out.shape == (2, 5, slots, 12)
    for row in range(2):
        for window in range(5):
            assert_close(out[row, window], naive.read_pooled_memory(memory, raw[row, window]))


def test_a_new_pooled_memory_mixes_layers_evenly():
    memory = PooledMemory(RecurGPT2Config(**SIZES | {"recurrence": "yoshida2020", "pool_layers": [0, 2, 3]}))
    memory.reset_parameters()
    raw = torch.randn(4, 3, 12)
    assert_close(memory.read(raw), memory.read(raw.mean(dim=1, keepdim=True).expand_as(raw)))


def test_the_papers_net_has_three_layers_of_200():
    net = PooledMemory(RecurGPT2Config(**SIZES | {"recurrence": "yoshida2020"})).net
    linear = [layer for layer in net if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(12, 200), (200, 200), (200, 12)]


# ---- which modules ---------------------------------------------------------------------------------------------------


def test_there_is_a_memory_for_each_insertion_layer_or_one_for_all_or_none():
    layered = Recurrence(RecurGPT2Config(**SIZES | {"last_slots": 2, "insert_layers": [1, 3]}))
    assert layered.names() == ["1", "3"]
    assert {type(layered.get(name)) for name in layered.names()} == {LayerMemory}
    pooled = Recurrence(RecurGPT2Config(**SIZES | {"recurrence": "yoshida2020"}))
    assert pooled.names() == ["pooled"]
    assert not Recurrence(RecurGPT2Config(**SIZES | {"recurrence": "none"})).names()


@pytest.mark.parametrize(
    ("given_type", "wide"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        *[(t, t) for t in (torch.float32, torch.float64)],
    ],
    ids=str,
)
def test_only_16_bit_types_are_widened(given_type, wide):
    assert widen(torch.zeros(2, dtype=given_type)).dtype == wide
