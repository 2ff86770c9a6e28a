"""cross_entropy.py: cross-entropy in chunks equals torch's at once, its gradients included."""

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from recur_gpt2.ops import cross_entropy
from recur_gpt2.ops.cross_entropy import accumulate_gradients, loss_of_logits, summed_loss, token_losses
from recur_gpt2.utils.tensors import IGNORE_INDEX

WIDTH, VOCABULARY = 8, 31
CHUNK = 4


def random_inputs(*shape, dtype=torch.float64, scored=0.8):
    torch.manual_seed(0)
    hidden = torch.randn(*shape, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=dtype, requires_grad=True)
    targets = torch.randint(VOCABULARY, shape)
    return hidden, weight, targets.masked_fill(torch.rand(shape) > scored, IGNORE_INDEX)


def reference(hidden, weight, targets, reduction="sum"):
    logits = hidden.flatten(0, -2) @ weight.T
    return functional.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction=reduction)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CPU_ROWS", CHUNK)
    pieces, _ = cross_entropy._chunks(torch.zeros(2 * CHUNK + 1, WIDTH), torch.zeros(VOCABULARY, WIDTH))
    assert [piece.stop - piece.start for piece in pieces] == [CHUNK, CHUNK, 1]


@pytest.mark.parametrize("rows", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 5])
@pytest.mark.usefixtures("small_chunks")
def test_the_loss_and_its_gradients_equal_torchs_at_every_border_of_chunks(rows):
    hidden, weight, targets = random_inputs(rows)
    ours, expected = (function(hidden, weight, targets) for function in (summed_loss, reference))
    assert_close(ours, expected)
    gradients = [torch.autograd.grad(3 * loss, (hidden, weight)) for loss in (ours, expected)]
    assert_close(*gradients)
    each = reference(hidden, weight, targets, "none")
    assert_close(token_losses(hidden, weight, targets).double(), each.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)], ids=str)
def test_any_leading_dimensions(shape):
    hidden, weight, targets = random_inputs(*shape, dtype=torch.float32)
    each = token_losses(hidden, weight, targets)
    assert (each.shape, each.dtype, each.requires_grad) == (shape, torch.float32, False)
    assert_close(each.flatten(), reference(hidden, weight, targets, "none").detach())
    total = summed_loss(hidden, weight, targets)
    assert (total.shape, total.dtype) == ((), torch.float32)
    assert_close(total, each.sum())
    gradients = torch.autograd.grad(total, (hidden, weight))
    assert [gradient.shape for gradient in gradients] == [hidden.shape, weight.shape]


@pytest.mark.usefixtures("small_chunks")
def test_gradients_agree_with_finite_differences():
    hidden, weight, targets = random_inputs(CHUNK + 2)
    assert torch.autograd.gradcheck(lambda *inputs: summed_loss(*inputs, targets), (hidden, weight))


def random_shares(count):
    """Of a mixture that points at every third target not at all."""
    generator = torch.Generator().manual_seed(3)
    copied = 0.5 * torch.rand(count, generator=generator, dtype=torch.float64)
    copied[::3] = 0
    return (1 - copied).mul(0.7).log(), copied


@pytest.mark.parametrize("rows", [1, 2 * CHUNK + 3])
def test_the_loss_of_a_mixture_is_that_of_its_probabilities(rows):
    hidden, weight, targets = random_inputs(rows)
    inputs = [each.clone().requires_grad_() for each in (hidden, weight, *random_shares(rows))]
    ours = summed_loss(*inputs[:2], targets, inputs[2:])
    probabilities = (inputs[0] @ inputs[1].T).softmax(dim=1).gather(1, targets.clamp_min(0)[:, None]).squeeze(1)
    mixed = inputs[2].exp() * probabilities + inputs[3]
    each = -mixed.log() * (targets != IGNORE_INDEX)
    assert_close(ours, each.sum())
    assert_close(torch.autograd.grad(2 * ours, inputs), torch.autograd.grad(2 * each.sum(), inputs))
    found = token_losses(hidden, weight, targets, inputs[2:])
    assert_close(found.double(), each, rtol=1e-5, atol=1e-6)
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    grad_hidden, grad_shares = accumulate_gradients(*leaves[:2], targets, torch.tensor(2.0), leaves[2:])
    expected = torch.autograd.grad(2 * summed_loss(*inputs[:2], targets, inputs[2:]), inputs)
    assert_close([grad_hidden, leaves[1].grad, *grad_shares], list(expected))


def test_positions_that_are_not_scored_cost_nothing_and_learn_nothing():
    hidden, weight, targets = random_inputs(4, 10, scored=0.5)
    unscored = targets == IGNORE_INDEX
    assert not token_losses(hidden, weight, targets)[unscored].any()
    total = summed_loss(hidden, weight, targets)
    grad_hidden, grad_weight = torch.autograd.grad(total, (hidden, weight))
    assert not grad_hidden[unscored].any()
    assert grad_hidden[~unscored].all()
    changed = hidden.detach().clone()
    changed[unscored] = 100.0
    changed.requires_grad_()
    again = summed_loss(changed, weight, targets)
    assert_close(again, total)
    assert_close(torch.autograd.grad(again, weight)[0], grad_weight)


def test_nothing_scored_is_zero_with_zero_gradients():
    hidden, weight, targets = random_inputs(3, 5)
    total = summed_loss(hidden, weight, torch.full_like(targets, IGNORE_INDEX))
    assert total == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(total, (hidden, weight)))


@pytest.mark.parametrize("frozen", [0, 1], ids=["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient_and_changes_none(frozen):
    inputs = random_inputs(3, 5)
    expected = torch.autograd.grad(reference(*inputs), inputs[1 - frozen])
    inputs[frozen].requires_grad_(False)
    total = summed_loss(*inputs)
    assert_close(torch.autograd.grad(total, inputs[1 - frozen]), expected)
    assert inputs[frozen].grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_loss_is_the_same_with_and_without_gradients(dtype):
    hidden, weight, targets = random_inputs(3, 5, dtype=dtype)
    with_gradients = summed_loss(hidden, weight, targets)
    with torch.no_grad():
        assert torch.equal(summed_loss(hidden, weight, targets), with_gradients)
    assert torch.equal(summed_loss(hidden.detach(), weight.detach(), targets), with_gradients)
    assert with_gradients.dtype == dtype


def test_no_gradient_is_made_where_none_is_wanted():
    hidden, weight, targets = random_inputs(3, 5)
    products = []

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            products.extend([function] * (function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)))
            return function(*args, **kwargs or {})

    with Counter():
        summed_loss(hidden, weight, targets)
        assert len(products) == 3  # the logits, and a gradient each
        products.clear()
        with torch.no_grad():
            summed_loss(hidden, weight, targets)
        assert len(products) == 1


def test_certain_and_hopeless_predictions_are_finite():
    hidden, weight, targets = random_inputs(3, 5, dtype=torch.float32)
    for factor in (1e2, 1e4):
        total = summed_loss(hidden * factor, weight, targets)
        gradients = torch.autograd.grad(total, (hidden, weight))
        assert all(torch.isfinite(tensor).all() for tensor in (total, *gradients))


def test_under_autocast_products_are_in_16_bit_and_sums_in_32():
    hidden, weight, targets = random_inputs(4, 40, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        total = summed_loss(hidden, weight, targets)
        each = token_losses(hidden, weight, targets)
    assert total.dtype == each.dtype == torch.float32
    gradients = torch.autograd.grad(total, (hidden, weight))
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    low = [tensor.detach().bfloat16().double().requires_grad_() for tensor in (hidden, weight)]
    expected = reference(*low, targets)
    assert_close(total.double(), expected, rtol=3e-3, atol=0)
    assert_close(each.sum().double(), expected, rtol=3e-3, atol=0)
    for ours, wanted in zip(gradients, torch.autograd.grad(expected, low), strict=True):
        assert_close(ours.double(), wanted, rtol=0.05, atol=0.02)
        assert not torch.equal(ours.double(), wanted)


def test_weights_kept_in_16_bit_get_gradients_of_their_type():
    hidden, weight, targets = random_inputs(4, 40, dtype=torch.bfloat16)
    total = summed_loss(hidden, weight, targets)
    assert total.dtype == torch.float32
    gradients = torch.autograd.grad(total, (hidden, weight))
    assert {gradient.dtype for gradient in gradients} == {torch.bfloat16}
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected = reference(*exact, targets)
    assert_close(total.double(), expected, rtol=3e-3, atol=0)
    for ours, wanted in zip(gradients, torch.autograd.grad(expected, exact), strict=True):
        assert_close(ours.double(), wanted, rtol=0.05, atol=0.02)


class Made(TorchDispatchMode):
    """Elements and place in memory of every tensor that is made, or changed in place."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        tensors = [each for each in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(each)]
        self.tensors += [(each.numel(), each.untyped_storage().data_ptr()) for each in tensors]
        return out


@pytest.mark.usefixtures("small_chunks")
def test_the_logits_of_all_positions_never_exist_together():
    """Nothing is larger than a chunk's logits, and what is kept for the backward pass no larger than the inputs."""
    hidden, weight, targets = random_inputs(5 * CHUNK)
    kept = []
    with (
        Made() as made,
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor.numel()), tensor)[1], lambda t: t),
    ):
        total = summed_loss(hidden, weight, targets)
        torch.autograd.grad(3 * total, (hidden, weight))
        token_losses(hidden, weight, targets)
    assert max(made.tensors)[0] == max(CHUNK * VOCABULARY, weight.numel())
    assert set(kept) <= {hidden.numel(), weight.numel(), targets.numel(), 1}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("frozen", [None, 0, 1], ids=["both learn", "frozen hidden states", "frozen head"])
def test_gradients_are_accumulated_as_a_backward_pass_would(frozen):
    hidden, weight, targets = random_inputs(3 * CHUNK)
    inputs = [each.detach().requires_grad_(number != frozen) for number, each in enumerate((hidden, weight))]
    wanted = [each for each in inputs if each.requires_grad]
    expected = dict(zip(map(id, wanted), torch.autograd.grad(2.5 * reference(*inputs, targets), wanted), strict=True))
    for times in (1, 2):  # the head's sum goes on
        grad_hidden, _ = accumulate_gradients(*inputs, targets, torch.tensor(2.5))
        if frozen == 0:
            assert grad_hidden is None
        else:
            assert_close(grad_hidden, expected[id(inputs[0])])
        if frozen == 1:
            assert inputs[1].grad is None
        else:
            assert_close(inputs[1].grad, times * expected[id(inputs[1])])


def test_accumulating_makes_nothing_as_large_as_the_head(monkeypatch):
    monkeypatch.setattr(cross_entropy, "VOCABULARY_ROWS", VOCABULARY // 3)
    hidden, weight, targets = random_inputs(3, dtype=torch.float32)
    accumulate_gradients(hidden, weight, targets, torch.tensor(1.0))
    here = {tensor.untyped_storage().data_ptr() for tensor in (weight, weight.grad)}
    with Made() as made:
        accumulate_gradients(hidden, weight, targets, torch.tensor(1.0))
    assert {place for size, place in made.tensors if size == weight.numel()} <= here


def test_the_backward_pass_makes_no_second_gradient_as_large_as_the_head():
    hidden, weight, targets = random_inputs(3, dtype=torch.float32)
    total = summed_loss(hidden, weight, targets)
    with Made() as made:
        (gradient,) = torch.autograd.grad(3 * total, weight)
    assert {place for size, place in made.tensors if size == weight.numel()} == {gradient.untyped_storage().data_ptr()}


def test_a_second_backward_pass_makes_the_same_gradients_again():
    hidden, weight, targets = random_inputs(3, 5)
    total = summed_loss(hidden, weight, targets)
    first = torch.autograd.grad(3 * total, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(3 * total, (hidden, weight))
    assert_close(second, first, rtol=0, atol=0)
    assert_close(first, torch.autograd.grad(3 * reference(hidden, weight, targets), (hidden, weight)))


# ---- from logits that are there --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, CHUNK, 2 * CHUNK + 3])
@pytest.mark.usefixtures("small_chunks")
def test_the_loss_of_logits_and_its_gradients_equal_torchs(rows):
    hidden, weight, targets = random_inputs(rows)
    ours = loss_of_logits(hidden @ weight.T, targets)
    expected = reference(hidden, weight, targets)
    assert_close(ours, expected)
    gradients = [torch.autograd.grad(3 * each, (hidden, weight)) for each in (ours, expected)]
    assert_close(*gradients)


def test_the_loss_of_logits_in_16_bit_is_summed_in_float32():
    hidden, weight, targets = random_inputs(300, scored=1.0)
    logits = (hidden @ weight.T).to(torch.bfloat16).detach().requires_grad_()
    loss = loss_of_logits(logits, targets)
    assert loss.dtype == torch.float32
    assert_close(loss, functional.cross_entropy(logits.float(), targets, reduction="sum"), rtol=1e-5, atol=0)
    loss.backward()
    assert logits.grad.dtype == torch.bfloat16
