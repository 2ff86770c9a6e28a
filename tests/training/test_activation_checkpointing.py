"""activation_checkpointing.py: computing again changes nothing, keeps few states, and makes each gradient once."""

import gc
import weakref

import pytest
import torch
from helpers_training import RECURRENCES, WINDOW, tiny_model
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from recur_gpt2.data.batches import Segment
from recur_gpt2.models.state import RecurState
from recur_gpt2.ops import cross_entropy
from recur_gpt2.training import activation_checkpointing
from recur_gpt2.training.arguments import TrainingArguments
from recur_gpt2.training.loss import SegmentLoss

LANES = 2
kinds = pytest.mark.parametrize("kind", RECURRENCES)


def random_segment(windows, seed=0):
    """One lane reads on, the other starts a document in the midst."""
    tokens = torch.randint(1, 97, (LANES, windows, WINDOW + 1), generator=torch.Generator().manual_seed(seed))
    starts = torch.zeros(LANES, windows, dtype=torch.bool)
    starts[1, windows // 2] = True
    numbers = torch.zeros(LANES, windows, dtype=torch.int64)
    return Segment(tokens[..., :-1], tokens[..., 1:], starts, numbers, numbers)


def run(model, windows, state=None, **arguments):
    loss = SegmentLoss(model, TrainingArguments(lanes=LANES, bptt=windows, **arguments))
    return loss(random_segment(windows), state)


def gradients_of(model, total):
    """As a backward pass leaves them, which recomputation adds to as it goes."""
    model.zero_grad()
    total.backward(retain_graph=True)
    found = [None if each.grad is None else each.grad.clone() for each in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize(("windows", "kept"), [(1, 8), (2, 8), (7, 2), (7, 3), (8, 8), (9, 8), (6, 1)])
@kinds
def test_however_few_states_are_kept_the_gradients_are_the_same(kind, windows, kept, block, monkeypatch):
    monkeypatch.setattr(activation_checkpointing, "KEPT", kept)
    model = tiny_model(kind).double()
    earlier = run(model, 2)[1].detach()
    expected, expected_state = run(model, windows, earlier)
    total, state = run(model, windows, earlier, checkpointing=True, parallel_windows=block)
    assert_close(total, expected)
    assert torch.equal(state.windows, expected_state.windows)
    assert_close(state.memory, expected_state.memory)
    assert_close(gradients_of(model, total), gradients_of(model, expected))


@kinds
def test_the_same_dropout_is_drawn_again(kind, monkeypatch):
    """In a block, and in those that are read once more to reach it; and afterwards the numbers go on as they would."""
    monkeypatch.setattr(activation_checkpointing, "KEPT", 2)
    model, found = tiny_model(kind, dropout=0.3).double().train(), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        total, _ = run(model, 7, checkpointing=checkpointing, parallel_windows=1)
        found.append((total, gradients_of(model, total), torch.rand(3)))
    assert_close(*found)


@pytest.mark.parametrize("of", [(1, 0), (0, 1), (1, 1)], ids=["the loss", "the state", "both"])
@kinds
def test_gradients_flow_to_the_state_before(kind, of):
    model, found = tiny_model(kind).double(), []
    earlier = run(model, 2)[1].detach()
    for checkpointing in (False, True):
        memory = {name: tensor.clone().requires_grad_() for name, tensor in earlier.memory.items()}
        total, state = run(model, 3, RecurState(earlier.windows, earlier.filled, memory), checkpointing=checkpointing)
        behind = sum((tensor**2).sum() for tensor in state.memory.values())
        gradients = gradients_of(model, of[0] * total + of[1] * behind)
        found.append([*(tensor.grad for tensor in memory.values()), *gradients])
    assert_close(*found)
    if of[0]:  # how far a state reaches another one depends on the number of layers
        assert all(gradient.any() for gradient in found[0][: len(earlier.memory)])


@pytest.mark.parametrize("outside", [True, False], ids=["backward outside", "backward inside"])
def test_under_autocast_products_run_again_as_they_did(outside):
    """With one window all but the embedding's gradient, added token by token, is equal to the last bit."""
    model, found = tiny_model(), []
    for checkpointing in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            total, state = run(model, 1, checkpointing=checkpointing)
            inside = None if outside else gradients_of(model, total)
        found.append((total, inside or gradients_of(model, total), state.memory))
    shared = [name for name, _ in model.named_parameters()].index("transformer.wte.weight")
    assert_close(found[0][1].pop(shared), found[1][1].pop(shared))
    assert_close(*found, rtol=0, atol=0)
    assert {tensor.dtype for name, tensor in found[1][2].items() if name != "pointer"} == {torch.bfloat16}


def test_what_takes_no_part_gets_no_gradient_and_what_is_frozen_is_left_alone():
    model = tiny_model()
    frozen = model.transformer.wpe.weight.requires_grad_(False)
    total, _ = run(model, 3, checkpointing=True, recurrent=False)
    total.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {
        name for name, parameter in model.named_parameters() if "recurrence" in name or parameter is frozen
    }


def test_the_head_is_multiplied_four_times_a_window():
    """Once for the loss; then once more for the logits, and for a gradient each."""
    model, products = tiny_model(), []

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
                products.append(any(model.config.vocab_size in each.shape for each in args))
            return function(*args, **kwargs or {})

    with Counter():
        total, _ = run(model, 3, checkpointing=True)
        assert sum(products) == 3
        gradients_of(model, total)
    assert sum(products) == 4 * 3


def test_without_recomputation_the_head_gets_one_gradient_a_segment():
    """Not one for each block: they would all be kept."""
    model, sizes = tiny_model(), []

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            if function.overloadpacket is torch.ops.aten.zeros_like:
                sizes.append(out.shape)
            return out

    with Counter():
        run(model, 3, parallel_windows=1)
    assert sizes.count(model.lm_head.weight.shape) == 1


def bytes_kept(model, windows):
    """What the forward pass of a segment leaves allocated, as torch's profiler counts it."""
    segment, loss = random_segment(windows), SegmentLoss(model, TrainingArguments(checkpointing=True))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        kept = loss(segment, None)
    assert kept[0].requires_grad
    return sum(event.self_cpu_memory_usage for event in measured.key_averages())


def test_a_segment_keeps_a_few_states_however_long_it_is():
    model = tiny_model()
    state = run(model, 2)[1]
    one, few, many = (bytes_kept(model, windows) for windows in (1, 8, 64))
    assert few - one > 6 * state.nbytes
    assert many <= few + state.nbytes


def test_states_are_freed_when_they_are_no_longer_needed():
    """By counting references: a cycle would keep the states of many segments until the next collection."""
    model = tiny_model()
    gc.disable()
    try:
        total, state = run(model, 3, checkpointing=True)
        total.backward()
        states = [weakref.ref(tensor) for tensor in state.memory.values()]
        state = state.detach()
        assert not any(reference() is not None for reference in states)
    finally:
        gc.enable()


def test_gradients_are_added_to_those_of_earlier_segments():
    model = tiny_model().double()
    total, _ = run(model, 3)
    once = gradients_of(model, total)
    for _ in range(2):
        run(model, 3, checkpointing=True)[0].backward()
    assert_close([None if each.grad is None else each.grad / 2 for each in model.parameters()], once)


def test_a_pytorch_that_does_not_tell_whether_gradients_are_added_is_trusted(monkeypatch):
    monkeypatch.delattr(torch.autograd, "_is_checkpoint_valid")
    assert activation_checkpointing._is_backward()


def test_no_second_set_of_gradients_is_made(monkeypatch):
    """Neither of the head nor of the embedding, which are the largest."""
    monkeypatch.setattr(cross_entropy, "VOCABULARY_ROWS", 10)
    model, made = tiny_model(), []
    run(model, 3, checkpointing=True)[0].backward()  # gradients are there
    total, _ = run(model, 3, checkpointing=True)
    weight = model.lm_head.weight

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            dense = torch.is_tensor(out) and out.layout is torch.strided
            if dense and out.shape == weight.shape and out.untyped_storage().data_ptr() not in known:
                made.append(function)
            return out

    known = {weight.untyped_storage().data_ptr(), weight.grad.untyped_storage().data_ptr()}
    with Watch():
        total.backward()
    assert not made


def test_a_gradient_without_backward_is_refused():
    model = tiny_model()
    total, _ = run(model, 2, checkpointing=True)
    with pytest.raises(RuntimeError, match=r"call backward\(\)"):
        torch.autograd.grad(total, list(model.parameters()), allow_unused=True)


def test_a_second_backward_pass_is_refused():
    total, _ = run(tiny_model(), 2, checkpointing=True)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="it cannot go twice"):
        total.backward()
