"""hybrid.py agrees with its definition, ignores what is not there, and stays finite."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from recur_gpt2.ops import hybrid as module
from recur_gpt2.ops.hybrid import MixingGate, hybrid_attention

ROWS, HEADS, FEATURES, WIDTH = 2, 3, 5, 4
EXACT = {"rtol": 1e-9, "atol": 1e-11}


def random_inputs(length, near, *, seed=0, dtype=torch.float64):
    """Queries, keys, values, features of both with a third at zero, and gates."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(ROWS, HEADS, *shape, generator=generator, dtype=torch.float64)

    features = [(normal(length, FEATURES) + 0.4).relu() for _ in range(2)]
    inputs = [normal(length, WIDTH), normal(near + length, WIDTH), normal(near + length, WIDTH), *features]
    return [each.to(dtype) for each in (*inputs, normal(length, 1))]


def random_state(seed=1):
    """What some places far in front left: (S, z)."""
    generator = torch.Generator().manual_seed(seed)
    key = torch.rand(ROWS, HEADS, 7, FEATURES, generator=generator, dtype=torch.float64)
    value = torch.randn(ROWS, HEADS, 7, WIDTH, generator=generator, dtype=torch.float64)
    return key.mT @ value, key.sum(dim=2)


def random_mask(length, near, seed=0):
    """Places in front and tokens that are there; each token of these sees itself."""
    mask = torch.rand(ROWS, near + length, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[0, near:] = True
    return mask


def by_definition(query, key, value, query_features, key_features, gate, state=None, *, mask=None, floor=1e-6):
    """One row, head and query at a time. A query that is a pad gets zeros."""
    length, near = query.shape[2], key.shape[2] - query.shape[2]
    mask = torch.ones(ROWS, near + length, dtype=torch.bool) if mask is None else mask
    out = torch.zeros_like(query)
    for row in range(ROWS):
        for head in range(HEADS):
            sums, norms = (0.0, 0.0) if state is None else (each[row, head] for each in state)
            for i in range(length):
                if mask[row, i]:
                    sums = sums + torch.outer(key_features[row, head, i], value[row, head, i])
                    norms = norms + key_features[row, head, i]
                places = [j for j in range(i + 1, near + i + 1) if mask[row, j]]
                weights = (key[row, head, places] @ query[row, head, i]).exp()
                numerator, denominator = weights @ value[row, head, places], weights.sum()
                phi = query_features[row, head, i]
                if torch.is_tensor(norms) and phi @ norms >= floor:
                    factor = gate[row, head, i].exp()
                    numerator = numerator + factor * (phi @ sums)
                    denominator = denominator + factor * (phi @ norms)
                if mask[row, near + i]:
                    out[row, head, i] = numerator / denominator
    return out


def seen(out, mask, near):
    """The outputs of queries that are tokens."""
    return out if mask is None else out * mask[:, None, near:, None]


def gradients(form, inputs, state, mask, near):
    leaves = [each.detach().clone().requires_grad_() for each in (*inputs, *(state or ()))]
    out = seen(form(*leaves[:6], tuple(leaves[6:]) or None, mask=mask), mask, near)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(out)
    return torch.autograd.grad((out * probe).sum(), leaves, allow_unused=True, materialize_grads=True)


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 14),
    near=st.integers(1, 9),
    chunk=st.integers(1, 9),
    carried=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_outputs_and_gradients_are_the_definitions(length, near, chunk, carried, masked, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        compare_with_definition(length, near, carried, masked, seed)


def compare_with_definition(length, near, carried, masked, seed):
    inputs, state = random_inputs(length, near, seed=seed), random_state(seed) if carried else None
    mask = random_mask(length, near, seed) if masked else None
    out = hybrid_attention(*inputs, state, mask=mask)
    assert_close(seen(out, mask, near), by_definition(*inputs, state, mask=mask), **EXACT)
    actual = gradients(hybrid_attention, inputs, state, mask, near)
    expected = gradients(by_definition, inputs, state, mask, near)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, **EXACT)


def test_gradients_agree_with_finite_differences():
    leaves = [each.requires_grad_() for each in (*random_inputs(5, 2), *random_state())]
    mask = random_mask(5, 2)
    mask[:, 2:] = True

    def function(*inputs):
        query, key, value, query_features, key_features, gate, sums, norms = inputs
        features = query_features + 0.1, key_features + 0.1  # off zero, where there is nothing far
        return hybrid_attention(query, key, value, *features, gate, (sums, norms), mask=mask)

    assert torch.autograd.gradcheck(function, leaves)


def test_where_everything_is_near_it_is_softmax_attention():
    query, key, value, *rest = random_inputs(6, 8)
    mask = (torch.arange(14) >= 8).expand(ROWS, -1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key[:, :, 8:], value[:, :, 8:], is_causal=True, scale=1.0
    )
    assert_close(hybrid_attention(query, key, value, *rest, mask=mask), expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gate", [-200.0, 0.0, 200.0])
def test_features_that_are_all_zero_leave_the_near_places_alone_and_gradients_finite(dtype, gate):
    inputs = random_inputs(9, 3, dtype=dtype)
    query, key, value, query_features, key_features, gates = inputs
    nothing = hybrid_attention(query, key, value, query_features, key_features * 0, gates + gate)
    assert_close(nothing, hybrid_attention(query, key, value, query_features * 0, key_features, gates))
    leaves = [each.requires_grad_() for each in inputs]
    zeroed = leaves[3] * 0, leaves[4] * 0
    out = hybrid_attention(*leaves[:3], *zeroed, leaves[5] + gate)
    (out.float() ** 2).sum().backward()
    assert all(each.grad.isfinite().all() for each in leaves)


@pytest.mark.parametrize("gate", [-300.0, 300.0])
def test_gates_and_scores_of_any_size_are_no_matter(gate):
    """They would overflow, were they not relative to the largest."""
    query, key, value, *features, gates = random_inputs(9, 2, dtype=torch.float32)
    query, state = 40 * query, tuple(each.float() for each in random_state())
    out = hybrid_attention(query, key, value, *features, gates + gate, state)
    assert out.isfinite().all()
    if gate > 0:
        key, value = torch.zeros_like(key), torch.where(torch.arange(11)[:, None] >= 9, 1e3, value)
        far = hybrid_attention(query * 0, key, value, *features, gates + gate, state)
        assert far[:, :, -1].abs().max() < 1e2, "far places alone are looked at"


def test_what_is_not_there_gets_no_gradient():
    inputs, mask = random_inputs(9, 4), random_mask(9, 4)
    _, key, value, _, key_features, _ = gradients(hybrid_attention, inputs, None, mask, 4)
    for grad, there in ((key, mask), (value, mask), (key_features, mask[:, :9])):
        assert (grad.transpose(1, 2)[~there] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_is_near_the_truth_and_keeps_its_type(dtype):
    inputs, state = random_inputs(300, 16, dtype=dtype), tuple(each.float() for each in random_state())
    exact = hybrid_attention(*(each.double() for each in inputs), tuple(each.double() for each in state))
    out = hybrid_attention(*inputs, state)
    assert out.dtype == dtype
    error = (out.double() - exact).norm() / exact.norm()
    assert error < 4 * torch.finfo(torch.bfloat16).eps


def test_autocast_leaves_the_types_alone():
    inputs = random_inputs(9, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(hybrid_attention(*inputs), hybrid_attention(*inputs), rtol=0, atol=0)
        actual = hybrid_attention(*inputs)
    assert torch.equal(actual, hybrid_attention(*inputs))


@pytest.mark.filterwarnings("ignore")
def test_it_compiles_without_a_break():
    inputs, mask = random_inputs(11, 4), random_mask(11, 4)
    compiled = torch.compile(hybrid_attention, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*inputs, mask=mask), hybrid_attention(*inputs, mask=mask), **EXACT)


def test_a_gate_is_an_affine_function_of_the_query():
    gate = MixingGate(HEADS, WIDTH, 4).double()
    query = random_inputs(6, 1)[0]
    assert (gate(query) == 0).all()
    torch.nn.init.normal_(gate.weight)
    torch.nn.init.normal_(gate.bias)
    for head in range(HEADS):
        expected = query[:, head] @ gate.weight[head] + gate.bias[head]
        assert_close(gate(query)[:, head, :, 0], expected)
