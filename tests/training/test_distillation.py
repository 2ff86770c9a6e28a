"""distillation.py: feature maps learn the attention of the softmax model that they came from, and nothing else does."""

import pytest
import torch
from conftest import LINEAR_FORMS, WINDOW, random_ids
from helpers_training import SmallCorpus, assert_same_weights, repetitive_documents, tiny_model
from torch.testing import assert_close

from recur_gpt2 import InputError, RecurGPT2LMHeadModel
from recur_gpt2.data.batches import Segment
from recur_gpt2.models.block import is_feature_map, is_new
from recur_gpt2.training.arguments import TrainingArguments
from recur_gpt2.training.distillation import TransferLoss
from recur_gpt2.training.optimizer import make_optimizer, set_rates
from recur_gpt2.training.trainer import Trainer


def make_segment(rows=2, windows=3, seed=0):
    ids = random_ids(rows, windows, WINDOW + 1, seed=seed)
    starts = torch.zeros(rows, windows, dtype=torch.bool)
    starts[0, 1] = True
    numbers = torch.zeros(rows, windows, dtype=torch.int64)
    return Segment(ids[..., :-1], ids[..., 1:], starts, numbers, numbers)


def divergence_naively(block, query, key, slots):
    """Mean over heads and queries of KL(softmax, linear); `slots` keys in front that every query sees. (H, T, d)"""
    feature_map, gate = block.feature_map, block.far_gate
    phi_query, phi_key = feature_map.features(query, key)
    total = 0.0
    for head in range(len(query)):
        for i in range(query.shape[1]):
            end = slots + i + 1
            wanted = (key[head, :end] @ query[head, i] * query.shape[2] ** -0.5).softmax(dim=0)
            products = phi_key[head, :end] @ phi_query[head, i]
            if gate is None:
                given = products / products.sum().clamp_min(feature_map.floor)
            else:
                scaled = query[head, i] * query.shape[2] ** -0.5
                given = products * (gate.weight[head] @ scaled + gate.bias[head]).exp()
                near = slice(max(0, end - gate.near_tokens), end)
                given[near] = (key[head, near] @ scaled).exp()
                given = given / given.sum()
            total += (wanted * (wanted.log() - (given + 1e-4).log())).sum()
    return total / query.shape[0] / query.shape[1]


@pytest.mark.parametrize("form", ["t2r", "t2r, default", "hedgehog, gated", "near", "near, default"])
@torch.no_grad()
def test_the_loss_is_the_mean_divergence_of_the_heads_with_memory_among_the_keys(make_model, form, monkeypatch):
    model, segment, found = make_model(form), make_segment(), {}

    def teach(block, query, key, memory, windows):
        if block.feature_map is None:
            return
        has = torch.as_tensor(windows.reads).expand(query.shape[0] * query.shape[1]).view(query.shape[:2])
        each = []
        for row in range(query.shape[0]):
            for window in range(query.shape[1]):
                keys, slots = key[row, window], 0
                if memory is not None and has[row, window]:
                    keys, slots = torch.cat((memory[row, window], keys), dim=1), memory.shape[3]
                each.append(divergence_naively(block, query[row, window], keys, slots))
        found.setdefault(block.attn.layer_idx, []).append(torch.stack(each).mean())  # of all windows, or of one

    earlier = model.transformer.teacher_forward(make_segment(seed=1).input_ids, segment.starts, None, lambda *_: None)
    model.transformer.teacher_forward(segment.input_ids, segment.starts, earlier, teach)
    assert sorted(found) == model.config.linear_layers
    expected = torch.stack([torch.stack(each).mean() for each in found.values()]).mean()
    for weights in (2**22, 300):  # all at once, and row by row
        monkeypatch.setattr("recur_gpt2.training.distillation.WEIGHTS", weights)
        loss, state = TransferLoss(model, recurrent=True)(segment, earlier)
        assert_close(loss / segment.scored, expected)
        assert state.windows.tolist() == [2, 6]


@torch.no_grad()
def test_the_teacher_is_the_model_before_conversion(gpt2_folder, make_model):
    """What the teacher leaves is what the softmax model leaves."""
    converted = make_model("t2r, default")
    softmax = RecurGPT2LMHeadModel.from_gpt2(gpt2_folder, window=WINDOW, last_slots=3).double()
    weights = {name: tensor for name, tensor in converted.state_dict().items() if not is_feature_map(name)}
    softmax.load_state_dict(weights)
    segment = make_segment()
    taught = converted.transformer.teacher_forward(segment.input_ids, segment.starts, None, lambda *_: None)
    _, expected = softmax.transformer.forward_windows(segment.input_ids, segment.starts)
    for name, tensor in expected.memory.items():
        assert_close(taught.memory[name], tensor)


@pytest.mark.parametrize("form", [form for form in LINEAR_FORMS if "elu" not in form])
def test_feature_maps_get_gradients_and_nothing_else_does(make_model, form):
    model = make_model(form)
    loss, _ = TransferLoss(model, recurrent=True)(make_segment(), None)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.numel()}
    made = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    for name, gradient in zip(named, made, strict=True):
        assert (gradient is not None and bool(gradient.any())) == is_feature_map(name), name


# ---- as a part of training -------------------------------------------------------------------------------------------


def trained(folder, *, resume=False, model=None, **settings):
    corpus = SmallCorpus(repetitive_documents())
    model = model or converted()
    args = TrainingArguments(lanes=2, bptt=2, precision="float32", save_every=1, lr=1e-2, **settings)
    history = Trainer(model, corpus, args, folder, device="cpu").run(resume=resume)
    return model, history


def converted(**options):
    return tiny_model(linear_layers="all", feature_size=6, **options)


def moved(before, after):
    return {
        name
        for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True)
        if (old != new).any()
    }


def test_transfer_moves_feature_maps_alone_and_lowers_the_divergence(tmp_path):
    model, history = trained(tmp_path, steps=1, transfer_steps=30, transfer_lr=3e-2)
    assert [set(row) & {"loss", "divergence"} for row in history] == [{"divergence"}] * 30 + [{"loss"}]
    assert history[29]["divergence"] < 0.8 * history[0]["divergence"]
    before = converted()
    stopped, _ = trained(tmp_path / "new", steps=1, new_first_steps=1, transfer_steps=3)
    assert all(map(is_new, moved(before, stopped)))
    assert any(map(is_feature_map, moved(before, stopped)))
    assert not all(map(is_new, moved(before, model)))


def test_the_new_parameters_can_go_first(tmp_path):
    before = converted()
    first, _ = trained(tmp_path / "first", steps=4, new_first_steps=4)
    both, _ = trained(tmp_path / "both", steps=4, new_first_steps=3)
    assert all(map(is_new, moved(before, first)))
    assert not all(map(is_new, moved(before, both)))


def test_afterwards_everything_learns_again(tmp_path):
    model, _ = trained(tmp_path, steps=2, new_first_steps=1, transfer_steps=1)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_was_frozen_stays_frozen(tmp_path):
    model = converted()
    model.transformer.wpe.weight.requires_grad_(False)
    before = model.transformer.wpe.weight.clone()
    trained(tmp_path, steps=2, transfer_steps=1, new_first_steps=1, model=model)
    assert torch.equal(model.transformer.wpe.weight, before)
    assert not model.transformer.wpe.weight.requires_grad


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_run_resumed_in_any_phase_ends_with_the_same_weights(tmp_path, monkeypatch, stop):
    settings = {"steps": 4, "transfer_steps": 2, "new_first_steps": 2}
    whole, history = trained(tmp_path / "whole", **settings)
    phase, calls = Trainer._phase, []

    def interrupted(self, step):
        calls.append(step)
        self._stop = len(calls) == stop
        return phase(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_phase", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "part", **settings)
    part, resumed = trained(tmp_path / "part", resume=True, **settings)
    assert_same_weights(part, whole)
    assert [row["step"] for row in resumed] == [row["step"] for row in history] == [1, 2, 3, 4, 5, 6]


def test_each_phase_has_a_course_of_rates_of_its_own():
    args = TrainingArguments(
        transfer_steps=10, steps=20, new_first_steps=10, warmup=0.2, lr=1.0, recurrence_lr=10.0, transfer_lr=5.0
    )
    optimizer, rates = make_optimizer(converted(), args), []
    for step in range(30):
        set_rates(optimizer, args, step)
        rates.append([group["lr"] for group in optimizer.param_groups])
        names = [group["new"] for group in optimizer.param_groups]
    old, new = names.index(False), names.index(True)
    transfer = [row[new] for row in rates[:10]]
    assert transfer == pytest.approx([2.5, 5.0, *(5.0 * (10 - step) / 8 for step in range(2, 10))])
    assert [row[new] for row in rates[10:14]] == pytest.approx([2.5, 5.0, 7.5, 10.0])
    assert rates[29][new] == pytest.approx(10 / 16)
    assert [row[old] for row in rates[20:22]] == pytest.approx([0.5, 1.0])
    assert rates[29][old] == pytest.approx(1 / 8)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ({}, {"transfer_steps": 3}, "transfer_steps=3 teaches feature maps, and this model has none that learns"),
        ({"linear_layers": [0], "feature_map": "elu"}, {"transfer_steps": 3}, "with another map than elu"),
        ({}, {"transfer_steps": -1}, "transfer_steps=-1 must be no less than 0"),
        ({}, {"steps": 2, "new_first_steps": 3}, "new_first_steps=3 exceeds steps=2; use 2"),
        ({}, {"transfer_lr": 0.0}, "transfer_lr=0.0 must be positive"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(tmp_path, model, settings, message):
    with pytest.raises(InputError, match=message):
        trained(tmp_path, model=tiny_model(**model), **settings)
