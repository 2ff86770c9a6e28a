"""The invariants of training, in float64, for every form of memory: true gradients, and what a graph keeps.

Those of reading are in test_invariants.py.
"""

import pytest
import torch
from conftest import ALL_FORMS, LINEAR_WITH_MEMORY, WINDOW, WITH_MEMORY, assert_same_state, random_gpt2, random_ids
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close

from recur_gpt2 import RecurGPT2LMHeadModel
from recur_gpt2.data.batches import Segment
from recur_gpt2.training.arguments import TrainingArguments
from recur_gpt2.training.loss import SegmentLoss
from recur_gpt2.utils.tensors import IGNORE_INDEX

# ---- 6: gradient truth -----------------------------------------------------------------------------------------------


def make_segment(rows=2, windows=4, seed=0):
    """Lanes in which a document starts at the segment's start, in its midst, and not at all; some targets unscored."""
    ids = random_ids(rows, windows, WINDOW + 1, seed=seed)
    targets = ids[..., 1:].clone()
    targets[0, windows // 2 - 1, WINDOW // 2 :] = IGNORE_INDEX
    starts = torch.zeros(rows, windows, dtype=torch.bool)
    starts[0, windows // 2] = True
    numbers = torch.zeros(rows, windows, dtype=torch.int64)
    return Segment(ids[..., :-1], targets, starts, numbers, numbers)


def loss_of(model, segment, state=None, **arguments):
    return SegmentLoss(model, TrainingArguments(**arguments))(segment, state)


def gradients(model, loss):
    """As a backward pass leaves them, which checkpointing adds to as it goes."""
    model.zero_grad()
    loss.backward()
    made = {
        name: torch.zeros_like(each) if each.grad is None else each.grad
        for name, each in model.named_parameters()
        if each.numel()
    }
    model.zero_grad()
    return made


@pytest.fixture
def embedded(make_model, monkeypatch):
    """The input embeddings of each reading by a model, as they are made."""

    def watch(model):
        seen = []

        def keep(module, args, output):
            output.retain_grad()
            seen.append(output)

        hook = model.transformer.wte.register_forward_hook(keep)
        hooks.append(hook)
        return seen

    hooks = []
    yield watch
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("parallel", [1, 3])
@pytest.mark.parametrize("form", WITH_MEMORY + LINEAR_WITH_MEMORY)
def test_gradients_reach_as_far_back_as_the_segment_and_no_further(make_model, embedded, form, parallel):
    model, windows = make_model(form), 3
    read, seen, state = model.transformer.forward_windows, embedded(model), None
    continues = torch.zeros(2, parallel, dtype=torch.bool)
    for segment in range(2):
        state = None if state is None else state.detach()
        for part in random_ids(2, windows, WINDOW, seed=segment).split(parallel, dim=1):
            hidden, state = read(part, continues, state)
    gradient = torch.autograd.grad((hidden[:, -1] ** 2).sum(), seen, allow_unused=True)
    per_window = [
        0.0 if each is None else float(each[:, window].abs().max()) for each in gradient for window in range(parallel)
    ]
    assert len(per_window) == 2 * windows
    assert per_window[:windows] == [0.0] * windows
    # Sinks carry nothing; memory pooled below the layers that read it is made before they have read any.
    # What is pointed at moves the loss, and no hidden states.
    reach = {"sinks only": 0, "rfa, sinks only": 0, "pointer": 0, "pooled below": 1}.get(form, windows - 1)
    assert [size > 0 for size in per_window[windows:]] == [window >= windows - 1 - reach for window in range(windows)]


@pytest.mark.parametrize("form", WITH_MEMORY + LINEAR_WITH_MEMORY)
def test_gradients_do_not_cross_into_another_document(make_model, embedded, form):
    model = make_model(form)
    seen = embedded(model)
    starts = torch.tensor([[True, False, True, False]])
    hidden, _ = model.transformer.forward_windows(random_ids(1, 4, WINDOW), starts)
    (gradient,) = torch.autograd.grad((hidden[:, -1] ** 2).sum(), seen)
    assert not gradient[:, :2].any()
    assert gradient[:, 2].any() == ("sinks only" not in form and form != "pointer")


@pytest.mark.parametrize("form", ALL_FORMS)
def test_checkpointing_and_parallel_windows_change_no_gradient(make_model, form):
    model = make_model(form)
    earlier = loss_of(model, make_segment(seed=1), bptt=4)[1].detach()
    segment = make_segment()
    expected_loss, expected_state = loss_of(model, segment, earlier, parallel_windows=1)
    expected = gradients(model, expected_loss)
    for checkpointing in (False, True):
        for parallel in (1, 2, 3, 4):
            loss, state = loss_of(model, segment, earlier, parallel_windows=parallel, checkpointing=checkpointing)
            assert_close(loss, expected_loss)
            assert_same_state(state, expected_state)
            assert_close(gradients(model, loss), expected)


@pytest.mark.parametrize("parallel", [1, 2])
def test_checkpointing_draws_the_same_dropout_again(parallel, tmp_path):
    random_gpt2(embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1).save_pretrained(tmp_path)
    model = RecurGPT2LMHeadModel.from_gpt2(tmp_path, window=WINDOW, last_slots=3).double().train()
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        loss, _ = loss_of(model, make_segment(), parallel_windows=parallel, checkpointing=checkpointing)
        found.append(gradients(model, loss))
    assert_close(*found)


@pytest.mark.parametrize("form", ALL_FORMS)
def test_the_segments_loss_is_that_of_the_logits(make_model, form):
    model, segment = make_model(form), make_segment()
    loss, _ = loss_of(model, segment, bptt=4)
    total = 0.0
    for row, first, end in ((0, 0, 2), (0, 2, 4), (1, 0, 4)):
        logits = model(segment.input_ids[row, first:end].reshape(1, -1)).logits[0]
        targets = segment.targets[row, first:end].flatten()
        total = total + torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    assert_close(loss, total)


def test_not_recurrent_means_every_window_apart(make_model, gpt2):
    model, segment = make_model("default"), make_segment()
    loss, _ = loss_of(model, segment, recurrent=False, bptt=4)
    logits = gpt2(segment.input_ids.flatten(0, 1)).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, segment.targets.flatten(), reduction="sum")
    assert_close(loss, expected)


@pytest.mark.parametrize("parallel", [1, 3])
@pytest.mark.parametrize("form", ALL_FORMS)
def test_gradients_agree_with_finite_differences(make_model, form, parallel):
    """Along a random direction of each parameter, the loss of three windows moves as its gradient says."""
    model, segment = make_model(form), make_segment(rows=1, windows=3)
    segment.starts[:] = False
    ours = gradients(model, loss_of(model, segment, parallel_windows=parallel)[0])
    parameters = dict(model.named_parameters())
    core = ("transformer.wte", "transformer.wpe", "h.0.attn", "h.1.mlp.c_fc", "h.3.ln_1", "h.2.attn.c_attn", "ln_f")
    step, generator = 1e-6, torch.Generator().manual_seed(0)
    for name, gradient in ours.items():
        if ".recurrence." not in name and not any(part in name for part in core):
            continue
        direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        found = []
        with torch.no_grad():
            kept = parameters[name].clone()
            for sign in (1, -1):
                parameters[name].copy_(kept + sign * step * direction)
                found.append(float(loss_of(model, segment, parallel_windows=parallel)[0]))
            parameters[name].copy_(kept)
        slope = (found[0] - found[1]) / (2 * step)
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-5, abs=1e-5), name


# ---- 9: memory -------------------------------------------------------------------------------------------------------


def bytes_saved(model, windows, **arguments):
    """Bytes of the tensors that a segment's graph saves for its backward pass, beside parameters and inputs."""
    segment = make_segment(windows=windows)
    given = (*model.parameters(), segment.input_ids, segment.targets, segment.starts)
    given = {tensor.untyped_storage().data_ptr() for tensor in given}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = loss_of(model, segment, **arguments)
    assert loss.requires_grad
    return sum(saved.values())


def bytes_allocated(model, windows, **arguments):
    """Bytes that the forward pass of a segment leaves allocated, as the profiler of torch counts them."""
    segment = make_segment(windows=windows)
    loss_of(model, segment, **arguments)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        kept = loss_of(model, segment, **arguments)
    assert kept[0].requires_grad
    return sum(event.self_cpu_memory_usage for event in measured.key_averages())


@pytest.mark.parametrize("parallel", [1, 3])
@pytest.mark.parametrize("form", ALL_FORMS)
def test_with_checkpointing_a_graph_saves_nothing_but_inputs(make_model, form, parallel):
    model = make_model(form)
    plain = [bytes_saved(model, windows, parallel_windows=parallel) for windows in (3, 9)]
    assert plain[1] > 2 * plain[0] > 0
    assert [bytes_saved(model, n, checkpointing=True, parallel_windows=parallel) for n in (3, 9)] == [0, 0]


@pytest.mark.parametrize("form", ["all slots, some layers", "pooled above"])
def test_with_checkpointing_a_window_more_costs_its_state_alone(make_model, form):
    """And the state of the random numbers, from which dropout is drawn again, and a number or two."""
    model = make_model(form)
    few, many = (bytes_allocated(model, windows, checkpointing=True) for windows in (2, 6))
    state = loss_of(model, make_segment(), checkpointing=True)[1]
    assert 0 < (many - few) / 4 <= state.nbytes + torch.get_rng_state().nbytes + 64
