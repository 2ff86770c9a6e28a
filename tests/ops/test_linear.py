"""linear.py: naive, chunked and stepwise agree with the definition, carry (S, z) alike, and ignore pads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from recur_gpt2.ops import linear as module
from recur_gpt2.ops.linear import CHUNK, absorb, chunked, linear_attention, naive, step

ROWS, HEADS, FEATURES, WIDTH = 2, 3, 5, 4
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
EXACT = {"rtol": 1e-9, "atol": 1e-11}


def random_inputs(length, *, rows=ROWS, heads=HEADS, features=FEATURES, width=WIDTH, seed=0, dtype=torch.float64):
    """phi(q), phi(k) with a third of the features at zero, and values."""
    generator = torch.Generator().manual_seed(seed)

    def normal(size):
        return torch.randn(rows, heads, length, size, generator=generator, dtype=torch.float64)

    return [
        each.to(dtype) for each in ((normal(features) + 0.4).relu(), (normal(features) + 0.4).relu(), normal(width))
    ]


def random_state(*, rows=ROWS, heads=HEADS, features=FEATURES, width=WIDTH, seed=1):
    """What some earlier tokens left."""
    _, key, value = random_inputs(7, rows=rows, heads=heads, features=features, width=width, seed=seed)
    return absorb(key, value)


def random_mask(rows, length, seed=0):
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < 0.7


def by_definition(query, key, value, state=None, *, mask=None, floor=module.FLOOR):
    """One row, head and token at a time."""
    rows, heads, length, features = query.shape
    out = torch.zeros_like(value)
    sums = value.new_zeros(rows, heads, features, value.shape[3]) if state is None else state[0].clone()
    norms = value.new_zeros(rows, heads, features) if state is None else state[1].clone()
    for row in range(rows):
        for head in range(heads):
            for i in range(length):
                if mask is None or mask[row, i]:
                    sums[row, head] += torch.outer(key[row, head, i], value[row, head, i])
                    norms[row, head] += key[row, head, i]
                denominator = (query[row, head, i] @ norms[row, head]).clamp_min(floor)
                out[row, head, i] = query[row, head, i] @ sums[row, head] / denominator
    return out, (sums, norms)


def stepwise(query, key, value, state=None, *, mask=None, floor=module.FLOOR):
    outs = []
    for i in range(query.shape[2]):
        here = slice(i, i + 1)
        token = (each[:, :, here] for each in (query, key, value))
        out, state = step(*token, state, mask=None if mask is None else mask[:, here], floor=floor)
        outs.append(out)
    return torch.cat(outs, dim=2), state


def small_chunks(*args, **options):
    return chunked(*args, chunk=4, **options)


FORMS = {"naive": naive, "chunked": small_chunks, "stepwise": stepwise}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def gradients(form, inputs, state=None, **options):
    """Of a random function of the output and of both sums, for every input."""
    leaves = [each.detach().clone().requires_grad_() for each in (*inputs, *(state or ()))]
    results = flat(form(*leaves[:3], tuple(leaves[3:]) or None, **options))
    generator = torch.Generator().manual_seed(2)
    probes = [torch.randn(each.shape, generator=generator, dtype=torch.float64).to(each) for each in results]
    return torch.autograd.grad(sum((each * probe).sum() for each, probe in zip(results, probes, strict=True)), leaves)


def flat(result):
    return result[0], *result[1]


def assert_same(actual, expected, **tolerance):
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, **(tolerance or EXACT))


# ---- the three forms -------------------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("masked", [False, True], ids=["no pads", "pads"])
@pytest.mark.parametrize("carried", [False, True], ids=["start", "carried"])
def test_every_form_is_the_definition(form, carried, masked):
    inputs, state = random_inputs(11), random_state() if carried else None
    mask = random_mask(ROWS, 11) if masked else None
    assert_same(flat(form(*inputs, state, mask=mask)), flat(by_definition(*inputs, state, mask=mask)))


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.integers(1, 40),
    features=st.integers(1, 6),
    width=st.integers(1, 6),
    chunk=st.integers(1, 48),
    split=st.integers(0, 40),
    carried=st.booleans(),
    pads=st.booleans(),
    floor=st.sampled_from([1e-6, 1e-2, 3.0]),
    seed=st.integers(0, 99),
)
def test_naive_chunked_and_stepwise_agree_split_anywhere(
    rows, heads, length, features, width, chunk, split, carried, pads, floor, seed
):
    shape = {"rows": rows, "heads": heads, "features": features, "width": width}
    inputs = random_inputs(length, seed=seed, **shape)
    state = random_state(seed=seed + 1, **shape) if carried else None
    mask = random_mask(rows, length, seed) if pads else None
    expected = flat(naive(*inputs, state, mask=mask, floor=floor))
    assert_same(flat(stepwise(*inputs, state, mask=mask, floor=floor)), expected)
    assert_same(flat(chunked(*inputs, state, mask=mask, floor=floor, chunk=chunk)), expected)
    outs = []
    for part in (slice(0, split), slice(split, length)):
        if len(range(length)[part]):
            some = (each[:, :, part] for each in inputs)
            out, state = chunked(*some, state, mask=mask if mask is None else mask[:, part], floor=floor, chunk=chunk)
            outs.append(out)
    assert_same((torch.cat(outs, dim=2), *state), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, 3 * CHUNK + 5])
def test_the_kernel_in_use_gives_what_naive_gives(length, device):
    inputs, mask = [each.to(device) for each in random_inputs(length)], random_mask(ROWS, length).to(device)
    assert_same(flat(linear_attention(*inputs, mask=mask)), flat(naive(*inputs, mask=mask)))
    assert_same(gradients(linear_attention, inputs, mask=mask), gradients(naive, inputs, mask=mask))


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 30), chunk=st.integers(1, 32), pads=st.booleans(), floor=st.sampled_from([1e-6, 2.0]))
def test_the_chunked_gradient_is_naives(length, chunk, pads, floor):
    inputs, state = random_inputs(length, seed=length), random_state(seed=chunk)
    options = {"mask": random_mask(ROWS, length) if pads else None, "floor": floor}
    expected = gradients(naive, inputs, state, **options)
    assert_same(gradients(lambda *args, **kw: chunked(*args, chunk=chunk, **kw), inputs, state, **options), expected)


@every_form
def test_gradients_agree_with_finite_differences(form):
    sizes = {"rows": 1, "heads": 2, "features": 3, "width": 2}
    mask = torch.tensor([[True, True, False, True, True, True]])
    inputs = [each + 0.1 for each in random_inputs(6, **sizes)]  # off the floor, which is a kink
    leaves = [each.requires_grad_() for each in (*inputs, *random_state(**sizes))]

    def function(query, key, value, sums, norms):
        return flat(form(query, key, value, (sums, norms), mask=mask))

    assert torch.autograd.gradcheck(function, leaves)


def test_checkpointing_changes_no_gradient():
    inputs = random_inputs(11)

    def again(*args, **options):
        return checkpoint(small_chunks, *args, use_reentrant=False, **options)

    assert_same(gradients(again, inputs, random_state()), gradients(small_chunks, inputs, random_state()))


@pytest.mark.filterwarnings("ignore")
def test_the_chunked_form_compiles_without_a_break():
    inputs, mask = random_inputs(11), random_mask(ROWS, 11)
    compiled = torch.compile(small_chunks, fullgraph=True, backend="aot_eager")
    assert_same(flat(compiled(*inputs, mask=mask)), flat(small_chunks(*inputs, mask=mask)))
    assert_same(gradients(compiled, inputs, mask=mask), gradients(small_chunks, inputs, mask=mask))


def test_inputs_may_lie_in_memory_in_any_order():
    inputs = random_inputs(9)
    strided = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in inputs]
    assert not strided[2].is_contiguous()
    assert_same(gradients(small_chunks, strided), gradients(small_chunks, inputs))


# ---- what the rows' neighbours and the future may not do -------------------------------------------------------------


@every_form
def test_a_token_changes_nothing_before_it(form):
    inputs = random_inputs(10)
    out, _ = form(*inputs)
    for place in range(10):
        later = [each.clone() for each in inputs]
        for each in later:
            each[:, :, place:] = 100.0
        assert torch.equal(form(*later)[0][:, :, :place], out[:, :, :place])
        assert not torch.equal(form(*later)[0][:, :, place:], out[:, :, place:])


@every_form
def test_pads_change_neither_outputs_nor_sums_nor_gradients(form):
    """Rows of 4, 9 and 0 tokens, spread over 9 places, get what they get alone."""
    inputs = random_inputs(9, rows=3)
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[0, [1, 4, 5, 8]] = mask[1] = True
    out, state = form(*inputs, mask=mask)
    grads = gradients(form, inputs, mask=mask)
    for row in range(2):
        kept = [each[row : row + 1, :, mask[row]] for each in inputs]
        alone, alone_state = form(*kept)
        assert_close(out[row : row + 1, :, mask[row]], alone, **EXACT)
        assert_same([each[row : row + 1] for each in state], alone_state)
        assert (grads[1][row][:, ~mask[row]] == 0).all()
        assert (grads[2][row][:, ~mask[row]] == 0).all()
    assert (out[2] == 0).all()
    assert all((each[2] == 0).all() for each in state)


@every_form
@pytest.mark.parametrize("carried", [False, True], ids=["start", "carried"])
def test_a_row_gets_in_a_batch_what_it_gets_alone(form, carried):
    inputs, state = random_inputs(10), random_state() if carried else None
    together = flat(form(*inputs, state))
    for row in range(ROWS):
        one = slice(row, row + 1)
        alone = form(*(each[one] for each in inputs), tuple(each[one] for each in state) if carried else None)
        assert_same([each[one] for each in together], flat(alone))


def test_memory_slots_are_keys_in_front_of_the_window():
    inputs, (_, slot_key, slot_value) = random_inputs(9), random_inputs(3, seed=5)
    query, key, value = inputs
    out, state = chunked(*inputs, absorb(slot_key, slot_value), chunk=4)
    key, value = torch.cat((slot_key, key), dim=2), torch.cat((slot_value, value), dim=2)
    longer, expected = naive(torch.cat((slot_key, query), dim=2), key, value)
    assert_same((out, *state), (longer[:, :, 3:], *expected))


def test_rows_without_memory_are_left_as_they_were():
    _, key, value = random_inputs(3)
    before = random_state()
    after = absorb(key, value, before, mask=torch.tensor([[True], [False]]))
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[1], new[1])
        assert not torch.equal(old[0], new[0])


# ---- features that are all zero --------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("zero", ["query", "key", "both"])
def test_features_that_are_all_zero_give_zeros_and_finite_gradients(zero, dtype, form):
    query, key, value = random_inputs(9, dtype=dtype)
    if zero != "key":
        query[:, :, 2:5] = 0
    if zero != "query":
        key[:] = 0
    out, _ = form(query, key, value)
    silent = out if zero != "query" else out[:, :, 2:5]
    assert (silent == 0).all()
    query, key = query.requires_grad_(), key.requires_grad_()
    (form(query.relu(), key.relu(), value)[0].float() ** 2).sum().backward()  # as ReLU features have it
    assert query.grad.isfinite().all()
    assert key.grad.isfinite().all()


@every_form
def test_below_the_floor_the_output_fades(form):
    query, key, value = random_inputs(9)
    out, _ = form(query, key, value)
    tiny = 1e-3 / (query * key.cumsum(dim=2)).sum(dim=-1, keepdim=True).clamp_min(1e-9)  # denominators of 1e-3
    assert_close(form(query * tiny, key, value, floor=1e-4)[0], out, **EXACT)
    assert_close(form(query * tiny, key, value, floor=1e-1)[0], out / 100, **EXACT)


# ---- types -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", [naive, chunked, linear_attention])
def test_sums_stay_exact_to_the_inputs_precision_over_long_documents(form, dtype):
    inputs = random_inputs(2500, rows=1, features=8, width=8, dtype=dtype)
    exact = flat(naive(*(each.double() for each in inputs)))
    out, state = form(*inputs)
    assert out.dtype == dtype
    assert all(each.dtype == torch.float32 for each in state)
    last = out[:, :, -100:].double(), exact[0][:, :, -100:]  # means over the whole document: small, in long sums
    for actual, expected in ((out.double(), exact[0]), last, *zip(state, exact[1:], strict=True)):
        error = (actual.double() - expected).norm() / expected.norm()
        assert error < torch.finfo(dtype).eps, error


def test_a_sum_in_16_bit_does_not_stop_growing():
    ones = torch.ones(1, 1, 3000, 1, dtype=torch.bfloat16)  # a bfloat16 sum of ones stops at 256
    for form in (naive, chunked):
        out, (sums, norms) = form(ones, ones, ones)
        assert_close(out, ones, rtol=0, atol=2**-7)  # S is rounded where it is multiplied
        assert (sums.item(), norms.item()) == (3000, 3000)


@every_form
def test_sums_beyond_float16s_largest_number_are_no_matter(form):
    large = torch.full((1, 1, 40, 1), 100.0, dtype=torch.float16)
    assert_close(form(large, large, large)[0], large)


def test_gradients_in_bfloat16_are_near_the_true_ones():
    inputs = random_inputs(300, features=16, width=16, dtype=torch.bfloat16)
    exact = gradients(naive, [each.double() for each in inputs])
    for actual, expected in zip(gradients(chunked, inputs), exact, strict=True):
        error = (actual.double() - expected).norm() / expected.norm()
        assert error < 2 * torch.finfo(torch.bfloat16).eps, error


@every_form
def test_autocast_leaves_the_types_alone(form):
    inputs = random_inputs(9, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual = flat(form(*inputs))
    assert_same(actual, flat(form(*inputs)), rtol=0, atol=0)


def test_the_chunked_gradient_is_the_same_inside_autocast():
    inputs = random_inputs(9, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual = gradients(small_chunks, inputs)
    assert_same(actual, gradients(small_chunks, inputs), rtol=0, atol=0)


def test_features_take_the_type_of_the_values():
    """Under autocast some maps return float32; the products are of the values' type all the same."""
    query, key, value = random_inputs(9, dtype=torch.bfloat16)
    assert_same(flat(chunked(query.float(), key.float(), value)), flat(chunked(query, key, value)), rtol=0, atol=0)
