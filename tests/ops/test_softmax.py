"""softmax.py: every kernel gives what an explicit softmax over the visible keys gives, and is causal."""

import pytest
import torch
from naive import attend
from torch.testing import assert_close

from recur_gpt2.ops import softmax
from recur_gpt2.ops.softmax import LONGEST_PRODUCTS, partial_window_attention, window_attention

ROWS, HEADS, WIDTH, SLOTS, SCALE = 3, 2, 4, 3, 0.4
NOBODY, SOME, ALL = [False] * 3, [True, False, True], [True] * 3
STEPS = {"QUERIES": 3, "QUERIES_WITHOUT_GRADIENT": 3, "QUERIES_IN_PRODUCTS": 3}
WAYS = {"at once": {}, "in steps": STEPS, "in steps, no products": STEPS | {"LONGEST_PRODUCTS": 0}}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
}


def random_inputs(length, new=None, seed=0):
    """query, key, value, memory keys, memory values in float64; `new` queries, or one a key."""
    torch.manual_seed(seed)
    sizes = (new or length, length, length, SLOTS, SLOTS)
    return [2 * torch.randn(ROWS, HEADS, size, WIDTH, dtype=torch.float64) for size in sizes]


def naive(inputs, has_memory, filled=(0, 0, 0)):
    query, key, value, *memory = inputs
    rows = []
    for row, has in enumerate(has_memory):
        keys, values = key[row], value[row]
        if has:
            keys, values = torch.cat((memory[0][row], keys), dim=1), torch.cat((memory[1][row], values), dim=1)
        rows.append(attend(query[row], keys, values, int(filled[row]), SLOTS if has else 0, SCALE))
    return torch.stack(rows)


def told(has_memory):
    """As the functions want it: one truth where rows agree, else a tensor."""
    return has_memory[0] if len(set(has_memory)) == 1 else torch.tensor(has_memory)


def windowed(inputs, has_memory, memory=True, **options):
    query, key, value, *slots = inputs
    return window_attention(query, key, value, slots if memory else None, told(has_memory), scale=SCALE, **options)


def resumed(inputs, has_memory, filled, memory=True):
    query, key, value, *slots = inputs
    slots = slots if memory else None
    return partial_window_attention(query, key, value, slots, told(has_memory), list(filled), scale=SCALE)


def rounded(inputs, dtype, device="cpu"):
    """The inputs in `dtype` on the device, and the same numbers in float64 for the reference."""
    low = [tensor.to(dtype) for tensor in inputs]
    return [tensor.to(device) for tensor in low], [tensor.double() for tensor in low]


def take(way, monkeypatch):
    for name, number in WAYS[way].items():
        monkeypatch.setattr(softmax, name, number)


def kernels_used(monkeypatch):
    """The names of the ways to compute, as they are taken."""
    used = []

    def spy(name):
        original = getattr(softmax, name)

        def call(*args, **options):
            used.append(name)
            return original(*args, **options)

        monkeypatch.setattr(softmax, name, call)

    for name in ("_products", "sdpa"):
        spy(name)
    return used


# ---- whole windows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("has_memory", [NOBODY, SOME, ALL], ids=["nobody", "some", "all"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("length", [1, 2, 7])
def test_a_window_equals_the_explicit_softmax(length, way, has_memory, dtype, device, monkeypatch):
    take(way, monkeypatch)
    low, exact = rounded(random_inputs(length), dtype, device)
    out = windowed(low, has_memory)
    assert out.dtype == dtype
    assert_close(out.cpu().double(), naive(exact, has_memory), **TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("dtype", "length", "size"),
    [
        (torch.float32, 300, 1),
        (torch.float32, LONGEST_PRODUCTS + 1, 1),
        (torch.bfloat16, LONGEST_PRODUCTS + 1, 1),
        (
            torch.bfloat16,
            300,
            0.5,
        ),  # products round to 16 bit before the softmax: large ones miss the tolerance
    ],
)
@pytest.mark.parametrize("has_memory", [NOBODY, SOME, ALL], ids=["nobody", "some", "all"])
@pytest.mark.parametrize("gradients", [False, True], ids=["without gradients", "with gradients"])
def test_a_long_window_equals_the_explicit_softmax(gradients, has_memory, dtype, length, size):
    low, exact = rounded([size * tensor for tensor in random_inputs(length)], dtype)
    with torch.set_grad_enabled(gradients):
        assert_close(windowed(low, has_memory).double(), naive(exact, has_memory), **TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("dtype", "length", "has_memory", "expected"),
    [
        (torch.float32, 8, NOBODY, "sdpa"),
        (torch.float32, 8, SOME, "sdpa"),
        (torch.float32, 8, ALL, "sdpa"),
        (torch.bfloat16, LONGEST_PRODUCTS, ALL, "_products"),
        (torch.bfloat16, LONGEST_PRODUCTS, NOBODY, "_products"),
        (torch.bfloat16, LONGEST_PRODUCTS + 1, ALL, "sdpa"),
        (torch.float16, 8, SOME, "_products"),
    ],
)
def test_the_cases_above_reach_every_kernel_of_a_cpu(dtype, length, has_memory, expected, monkeypatch):
    used = kernels_used(monkeypatch)
    low, _ = rounded(random_inputs(length), dtype)
    windowed(low, has_memory)
    assert set(used) == {expected}


@pytest.mark.parametrize("has_memory", [NOBODY, SOME, ALL], ids=["nobody", "some", "all"])
@pytest.mark.parametrize("at_once", [1, 2], ids="{} rows at once".format)
def test_how_many_rows_are_computed_at_once_changes_nothing(at_once, has_memory, monkeypatch):
    low, exact = rounded(random_inputs(7), torch.bfloat16)
    monkeypatch.setattr(softmax, "CHUNK_WEIGHTS", at_once * HEADS * 7 * (7 + SLOTS))
    parts, original = [], softmax._some_products

    def spy(query, *args, **options):
        parts.append(len(query))
        return original(query, *args, **options)

    monkeypatch.setattr(softmax, "_some_products", spy)
    assert_close(windowed(low, has_memory).double(), naive(exact, has_memory), **TOLERANCE[torch.bfloat16])
    assert parts == ([1, 1, 1] if at_once == 1 else [2, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_inference_leaves_behind_can_be_trained_with(dtype):
    """Masks are kept from call to call; a tensor made in inference mode could not be saved for a backward pass."""
    inputs = rounded(random_inputs(11), dtype)[0]
    softmax._all_visible.cache_clear()
    softmax._future.cache_clear()
    with torch.inference_mode():
        expected = windowed(inputs, ALL).clone()
    out = windowed([tensor.requires_grad_() for tensor in inputs], ALL)
    assert torch.equal(out, expected)
    out.sum().backward()


def test_no_memory_at_all_is_memory_that_nobody_has():
    inputs = random_inputs(6)
    assert_close(windowed(inputs, ALL, memory=False), naive(inputs, NOBODY))
    assert_close(windowed(inputs, NOBODY), naive(inputs, NOBODY))


def test_memory_kept_in_another_type_takes_the_windows_type():
    query, key, value, *memory = random_inputs(6)
    out = windowed([query, key, value, *(slot.float() for slot in memory)], ALL)
    assert out.dtype == torch.float64
    assert_close(out, naive([query, key, value, *memory], ALL), rtol=1e-5, atol=1e-5)


# ---- windows resumed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("has_memory", [NOBODY, SOME, ALL], ids=["nobody", "some", "all"])
@pytest.mark.parametrize("filled", [(1, 1, 1), (4, 4, 4), (1, 4, 2), (0, 3, 5)], ids=str)
@pytest.mark.parametrize("new", [1, 3])
def test_a_resumed_window_equals_the_explicit_softmax(new, filled, has_memory, dtype):
    low, exact = rounded(random_inputs(max(filled) + new, new), dtype)
    out = resumed(low, has_memory, filled)
    assert out.dtype == dtype
    assert_close(out.double(), naive(exact, has_memory, filled), **TOLERANCE[dtype])


@pytest.mark.parametrize("memory", [True, False])
def test_a_resumed_window_may_hold_more_places_than_are_filled(memory):
    inputs = random_inputs(9, new=1)
    expected = naive(inputs, ALL if memory else NOBODY, (3, 3, 3))
    assert_close(resumed(inputs, ALL, (3, 3, 3), memory), expected)


def test_a_window_in_two_pieces_equals_the_window_at_once():
    query, key, value, *memory = random_inputs(9)
    whole = windowed([query, key, value, *memory], SOME)
    assert_close(resumed([query[:, :, 5:], key, value, *memory], SOME, (5, 5, 5)), whole[:, :, 5:])


# ---- causality -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_memory", [NOBODY, SOME, ALL], ids=["nobody", "some", "all"])
@pytest.mark.parametrize("way", WAYS)
def test_a_key_or_value_moves_its_own_place_and_later_ones_only(way, has_memory, dtype, monkeypatch):
    take(way, monkeypatch)
    length = 9
    low, _ = rounded(random_inputs(length), dtype)
    before = windowed(low, has_memory)
    for place in range(length):
        for which in (1, 2):
            changed = [tensor.clone() for tensor in low]
            changed[which][:, :, place] += 3
            moved = (windowed(changed, has_memory) != before).any(dim=-1)  # (B, H, T)
            assert not moved[..., :place].any()
            if which == 2 and dtype == torch.float64:
                assert moved[..., place:].all()
            elif which == 2 or place:
                assert moved[..., place:].any()


@pytest.mark.parametrize("way", WAYS)
def test_memory_moves_the_rows_that_have_it_and_no_others(way, monkeypatch):
    take(way, monkeypatch)
    for slot in range(SLOTS):
        inputs = random_inputs(7)
        for has_memory in (SOME, ALL):
            before = windowed(inputs, has_memory)
            changed = [tensor.clone() for tensor in inputs]
            changed[4][:, :, slot] += 3
            moved = (windowed(changed, has_memory) != before).any(dim=-1)
            assert moved.flatten(1).all(dim=1).tolist() == moved.flatten(1).any(dim=1).tolist() == has_memory


@pytest.mark.parametrize("filled", [(4, 4, 4), (1, 4, 2)], ids=str)
def test_a_resumed_window_is_causal(filled):
    new = 3
    inputs = random_inputs(max(filled) + new, new)
    before = resumed(inputs, SOME, filled)
    for place in range(max(filled) + new):
        changed = [tensor.clone() for tensor in inputs]
        changed[2][:, :, place] += 3
        moved = (resumed(changed, SOME, filled) != before).any(dim=-1).all(dim=1)  # (B, n)
        expected = [[place <= fill + i for i in range(new)] for fill in filled]
        assert moved.tolist() == expected


# ---- gradients and dropout -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_memory", [NOBODY, SOME, ALL], ids=["nobody", "some", "all"])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_a_window_equal_those_of_the_explicit_softmax(way, has_memory, dtype, monkeypatch):
    take(way, monkeypatch)
    low, exact = rounded(random_inputs(7), dtype)
    torch.manual_seed(1)
    out = torch.randn_like(exact[0])
    gradients = [
        torch.autograd.grad(function([t.requires_grad_() for t in inputs], has_memory), inputs, grad, allow_unused=True)
        for function, inputs, grad in ((windowed, low, out.to(dtype)), (naive, exact, out.to(dtype).double()))
    ]
    loose = {"rtol": 5e-2, "atol": 5e-2} if dtype == torch.bfloat16 else TOLERANCE[dtype]
    for ours, wanted in zip(*gradients, strict=True):
        assert (ours is None) == (wanted is None)
        if ours is not None:
            assert_close(ours.double(), wanted, **loose)


@pytest.mark.parametrize("has_memory", [NOBODY, SOME, ALL], ids=["nobody", "some", "all"])
@pytest.mark.parametrize("filled", [(4, 4, 4), (1, 4, 2)], ids=str)
@pytest.mark.parametrize("new", [1, 3])
def test_gradients_of_a_resumed_window_equal_those_of_the_explicit_softmax(new, filled, has_memory):
    inputs = [tensor.requires_grad_() for tensor in random_inputs(max(filled) + new, new)]
    gradients = [
        torch.autograd.grad((function(inputs, has_memory, filled) ** 2).sum(), inputs, allow_unused=True)
        for function in (resumed, naive)
    ]
    for ours, wanted in zip(*gradients, strict=True):
        assert (ours is None) == (wanted is None)
        if ours is not None:
            assert_close(ours, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_memory", [NOBODY, SOME, ALL], ids=["nobody", "some", "all"])
@pytest.mark.parametrize("way", WAYS)
def test_dropout_drops_weights_and_keeps_their_mean(way, has_memory, dtype, monkeypatch):
    take(way, monkeypatch)
    query, key, value, *memory = rounded(random_inputs(64), dtype)[0]
    torch.manual_seed(0)
    ones = [query, key, torch.ones_like(value), memory[0], torch.ones_like(memory[1])]
    out = windowed(ones, has_memory, dropout=0.5).float()
    assert_close(out.mean(), torch.tensor(1.0), rtol=0, atol=0.1)
    assert out.std() > 0.2
    first = out[1, :, 0] if not has_memory[1] else torch.tensor(0.0)
    assert set(first.unique().tolist()) <= {0.0, 2.0}  # one weight: kept and doubled, or dropped
