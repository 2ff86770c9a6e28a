"""trainer.py: what a run computes, and that a run killed at any moment ends as one that was not."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import helpers_training
import pytest
import torch
from helpers_training import (
    RECURRENCES,
    WINDOW,
    SmallCorpus,
    assert_same_weights,
    dropout_run,
    gpt2_of,
    losses_of,
    plain_run,
    random_documents,
    repetitive_documents,
    small_run,
    tiny_model,
    weights_of,
)
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recur_gpt2.data.batches import Segment, TrainingLanes
from recur_gpt2.errors import InputError
from recur_gpt2.models.block import is_new
from recur_gpt2.models.state import RecurState
from recur_gpt2.training import trainer
from recur_gpt2.training.arguments import TrainingArguments
from recur_gpt2.training.loss import SegmentLoss
from recur_gpt2.training.optimizer import make_optimizer, set_rates
from recur_gpt2.training.trainer import Trainer
from recur_gpt2.utils.tensors import IGNORE_INDEX

STEPS = 6
kinds = pytest.mark.parametrize("kind", RECURRENCES)


class KilledError(Exception):
    pass


def kill(trainer, *, step, late):
    """Let the trainer die in a step: at its start, or when its weights are changed and nothing is saved yet."""
    whole_step = trainer._step

    def dying_step(*args):
        here = len(trainer.history) + 1 == step
        if here and not late:
            raise KilledError
        result = whole_step(*args)
        if here:
            raise KilledError
        return result

    trainer._step = dying_step
    with pytest.raises(KilledError):
        trainer.run()


def event_steps(folder, tag="loss"):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed: dropout, accumulation, six steps, checkpoints at 2, 4 and 6."""
    trainer = dropout_run(tmp_path_factory.mktemp("whole"))
    trainer.run()
    return trainer


def assert_ends_as(whole, trainer, history):
    assert losses_of(history) == losses_of(whole.history)
    assert [row["tokens"] for row in history] == [row["tokens"] for row in whole.history]
    assert_same_weights(trainer.model, whole.model)


# ---- what a step computes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recurrent", [True, False])
@kinds
def test_the_loss_goes_down_on_repetitive_documents(kind, recurrent, tmp_path):
    model = tiny_model(kind, initializer_range=0.02, memory_std=0.02)
    corpus = SmallCorpus(repetitive_documents())
    history = small_run(
        model, tmp_path, corpus=corpus, steps=60, lr=1e-2, recurrence_lr=1e-2, save_every=99, recurrent=recurrent
    ).run()
    assert history[0]["loss"] == pytest.approx(math.log(97), rel=0.1)
    assert history[-1]["loss"] < history[0]["loss"] / 3


@pytest.mark.parametrize("recurrent", [True, False])
@pytest.mark.parametrize("accumulate", [1, 3])
@kinds
def test_a_run_is_what_a_plain_loop_computes(kind, accumulate, recurrent, tmp_path):
    settings = {"accumulate": accumulate, "recurrent": recurrent, "clip": 0.5, "warmup": 0.4, "weight_decay": 0.1}
    ours, plain = tiny_model(kind).double(), tiny_model(kind).double()
    trainer = small_run(ours, tmp_path, lr=1e-2, recurrence_lr=3e-2, **settings)
    history = trainer.run()
    losses = plain_run(plain, trainer.corpus, trainer.args)
    assert losses_of(history) == pytest.approx(losses, rel=1e-9)
    wanted = weights_of(plain)
    for name, weight in weights_of(ours).items():
        torch.testing.assert_close(weight, wanted[name], rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize(
    "how",
    [{"parallel_windows": 1}, {"parallel_windows": 2}, {"checkpointing": True}, {"checkpointing": True} | {"bptt": 3}],
    ids=["P=1", "P=2", "checkpointing", "checkpointing, K=3"],
)
@kinds
def test_how_windows_are_computed_changes_no_loss_and_no_weight(kind, how, tmp_path):
    settings = {"bptt": 3, "steps": 4, "save_every": 9} | how
    left, right = tiny_model(kind).double(), tiny_model(kind).double()
    one = small_run(left, tmp_path / "a", **settings).run()
    other = small_run(right, tmp_path / "b", **settings | {"checkpointing": False, "parallel_windows": 3}).run()
    assert losses_of(one) == pytest.approx(losses_of(other), rel=1e-12)
    wanted = weights_of(right)
    for name, weight in weights_of(left).items():
        torch.testing.assert_close(weight, wanted[name], rtol=1e-8, atol=1e-10, msg=name)


def test_checkpointing_recomputes_the_same_dropout(tmp_path):
    """Else gradients would be those of another loss."""
    settings = {"bptt": 3, "steps": 4, "save_every": 9, "parallel_windows": 1}
    left, right = (tiny_model(dropout=0.2).double() for _ in range(2))
    one = small_run(left, tmp_path / "a", **settings, checkpointing=True).run()
    other = small_run(right, tmp_path / "b", **settings).run()
    # Without checkpointing one sum runs over the whole segment: equal to rounding. Other dropout would differ at once.
    assert losses_of(one) == pytest.approx(losses_of(other), rel=1e-12)
    for name, weights in weights_of(right).items():
        torch.testing.assert_close(weights_of(left)[name], weights, rtol=1e-7, atol=1e-9, msg=name)


@kinds
def test_the_disjoint_control_never_lets_memory_through(kind, tmp_path):
    model = tiny_model(kind)
    reference, before = gpt2_of(model), weights_of(model)
    trainer = small_run(model, tmp_path, recurrent=False, lr=1e-9)  # a rate so small that the weights stay
    history = trainer.run()
    lanes = TrainingLanes(trainer.corpus, lanes=3, window=WINDOW, seed=0)
    for row in history:
        segment = lanes.segment(2)
        with torch.no_grad():
            logits = reference(segment.input_ids.flatten(0, 1)).logits.flatten(0, 1)
        wanted = torch.nn.functional.cross_entropy(logits, segment.targets.flatten())
        assert row["loss"] == pytest.approx(wanted.item(), rel=1e-4)
    for name, weight in weights_of(model).items():
        if "recurrence" in name:
            assert torch.equal(weight, before[name]), "what does not take part has no gradient"


def test_memory_from_the_segment_before_is_read_but_gets_no_gradient():
    model = tiny_model().train()
    tokens = torch.randint(1, 97, (2, 3, WINDOW))
    starts = torch.tensor([[True, False, False]] * 2)
    args = TrainingArguments(bptt=1)
    first = SegmentLoss(model, args)

    def segment(windows):
        zeros = torch.zeros(2, 3, dtype=torch.int64)
        return Segment(*(whole[:, windows] for whole in (tokens, tokens, starts, zeros, zeros)))

    _, state = first(segment(slice(0, 2)), None)
    kept = {name: tensor.requires_grad_() for name, tensor in state.detach().memory.items()}
    loss, _ = first(segment(slice(2, 3)), RecurState(state.windows, state.filled, kept))
    reached = torch.autograd.grad(loss, list(kept.values()), retain_graph=True)
    assert all(bool(gradient.any()) for gradient in reached), "memory is read"
    without, _ = first(segment(slice(2, 3)), None)
    assert without.item() != pytest.approx(loss.item())


def test_tokens_counted_are_scored_targets(tmp_path):
    trainer = small_run(tiny_model(), tmp_path, accumulate=2)
    history = trainer.run()
    lanes = TrainingLanes(trainer.corpus, lanes=3, window=WINDOW, seed=0)
    segments = [lanes.segment(2) for _ in range(2 * STEPS)]
    scored = [int((segment.targets != IGNORE_INDEX).sum()) for segment in segments]
    assert [row["tokens"] for row in history] == [sum(scored[: 2 * step]) for step in range(1, STEPS + 1)]
    assert [row["step"] for row in history] == list(range(1, STEPS + 1))
    assert all(row["tokens_per_second"] > 0 for row in history)


# ---- rates -----------------------------------------------------------------------------------------------------------


@kinds
def test_the_recurrence_has_a_rate_of_its_own_and_only_pretrained_matrices_decay(kind):
    model = tiny_model(kind)
    args = TrainingArguments(lr=1e-4, recurrence_lr=1e-2, weight_decay=0.1)
    groups = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in make_optimizer(model, args).param_groups
        for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        if ".recurrence." in name:
            assert groups[id(parameter)] == (1e-2, 0), name
        else:
            assert groups[id(parameter)] == (1e-4, 0.1 if parameter.ndim >= 2 else 0), name


def test_a_model_without_recurrence_has_an_optimizer_too():
    optimizer = make_optimizer(tiny_model(recurrence="none", last_slots=0), TrainingArguments())
    assert {group["lr"] for group in optimizer.param_groups} == {TrainingArguments().lr}


def test_rates_rise_to_the_peak_and_fall_towards_zero():
    args = TrainingArguments(steps=20, warmup=0.25, lr=1.0, recurrence_lr=10.0)
    optimizer = make_optimizer(tiny_model(), args)
    factors = []
    for step in range(20):
        set_rates(optimizer, args, step)
        first, *others = (group["lr"] / group["peak"] for group in optimizer.param_groups)
        assert others == pytest.approx([first] * len(others)), "one course for all groups"
        factors.append(first)
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5:] == pytest.approx([(20 - step) / 15 for step in range(5, 20)])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_gradient_of_a_step_is_clipped_once_to_its_norm(accumulate, tmp_path, monkeypatch):
    """With plain descent at rate 1, the step is the gradient: its norm is `clip` where the gradient was larger."""
    monkeypatch.setattr(
        trainer,
        "make_optimizer",
        lambda model, args: torch.optim.SGD([{"params": model.parameters(), "lr": 1.0, "peak": 1.0, "new": False}]),
    )

    def step_taken(clip):
        model = tiny_model().double()
        before = weights_of(model)
        small_run(model, tmp_path / f"{clip}", steps=1, accumulate=accumulate, clip=clip).run()
        return torch.cat([(weight - before[name]).flatten() for name, weight in weights_of(model).items()])

    free, clipped = step_taken(1e9), step_taken(0.1)
    assert free.norm() > 0.5
    torch.testing.assert_close(clipped, free / free.norm() * 0.1, rtol=1e-5, atol=1e-12)


# ---- a run that is killed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True], ids=["before its step", "after its step"])
@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_run_killed_at_any_step_ends_as_one_that_was_not(step, late, whole, tmp_path):
    kill(dropout_run(tmp_path), step=step, late=late)
    resumed = dropout_run(tmp_path)
    assert_ends_as(whole, resumed, resumed.run(resume=True))


@kinds
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_kind_of_memory_resumes_exactly(kind, checkpointing, tmp_path):
    def run(folder):
        model = tiny_model(kind, dropout=0.1)
        return small_run(model, folder, checkpointing=checkpointing, save_every=3, precision="bfloat16")

    whole = run(tmp_path / "whole")
    whole.run()
    kill(run(tmp_path / "killed"), step=5, late=True)
    resumed = run(tmp_path / "killed")
    assert_ends_as(whole, resumed, resumed.run(resume=True))


def test_a_run_killed_again_and_again_ends_as_one_that_was_not(whole, tmp_path):
    for step in (3, 4, 6):
        trainer = dropout_run(tmp_path)
        whole_step = trainer._step

        def dying_step(*args, trainer=trainer, whole_step=whole_step, step=step):
            if len(trainer.history) + 1 == step:
                raise KilledError
            return whole_step(*args)

        trainer._step = dying_step
        with pytest.raises(KilledError):
            trainer.run(resume=True)
    resumed = dropout_run(tmp_path)
    assert_ends_as(whole, resumed, resumed.run(resume=True))


def test_a_run_over_a_stream_resumes_exactly(tmp_path):
    corpus = SmallCorpus(random_documents((20, 9, 23, 14)), streamed=True)

    def run(folder):
        return small_run(tiny_model(), folder, corpus=corpus, steps=8, save_every=5)  # several epochs

    whole = run(tmp_path / "whole")
    whole.run()
    kill(run(tmp_path / "killed"), step=7, late=False)
    resumed = run(tmp_path / "killed")
    assert_ends_as(whole, resumed, resumed.run(resume=True))


def test_how_memory_is_saved_may_change_on_resuming(tmp_path):
    def run(folder, **settings):
        return small_run(tiny_model().double(), folder, bptt=3, **settings)

    whole = run(tmp_path / "whole")
    whole.run()
    kill(run(tmp_path / "killed"), step=3, late=False)
    resumed = run(tmp_path / "killed", checkpointing=True, save_every=1)
    assert losses_of(resumed.run(resume=True)) == pytest.approx(losses_of(whole.history), rel=1e-10)


def test_a_run_that_has_ended_can_be_resumed_and_does_nothing(whole, tmp_path):
    dropout_run(tmp_path).run()
    resumed = dropout_run(tmp_path)
    assert_ends_as(whole, resumed, resumed.run(resume=True))


def test_a_resumed_run_goes_on_in_the_type_that_it_began_with(tmp_path, monkeypatch):
    run = small_run(tiny_model(), tmp_path, precision="bfloat16")
    kill(run, step=3, late=False)
    used = []
    resumed = small_run(tiny_model(), tmp_path, precision="auto")
    monkeypatch.setattr(trainer, "autocast_dtype", lambda *args, **_: pytest.fail("measured again"))
    whole_step = resumed._step

    def watched_step(*args):
        used.append(args[-1])
        return whole_step(*args)

    resumed._step = watched_step
    resumed.run(resume=True)
    assert set(used) == {torch.bfloat16}


def start_process(folder, how):
    script = Path(helpers_training.__file__)
    return subprocess.Popen(
        [sys.executable, script, folder, how],
        # As many threads as here: sums are split among them, and the last bit would differ.
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_process_killed_while_it_writes_a_checkpoint_is_resumed_exactly(whole, tmp_path):
    process = start_process(tmp_path, "kill")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors
    assert list((tmp_path / "checkpoints").glob(".step-00000004.*.unfinished")), "killed halfway"
    resumed = dropout_run(tmp_path)
    assert resumed.checkpoints.latest().name == "step-00000002"
    assert_ends_as(whole, resumed, resumed.run(resume=True))
    assert not list((tmp_path / "checkpoints").glob("*.unfinished"))


def test_ctrl_c_leaves_a_checkpoint_and_resumes_exactly(whole, tmp_path):
    process = start_process(tmp_path, "wait")
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert "KeyboardInterrupt: stopped after step 3; --resume goes on from there" in errors
    resumed = dropout_run(tmp_path)
    assert resumed.checkpoints.latest().name == "step-00000003"
    assert_ends_as(whole, resumed, resumed.run(resume=True))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_step_under_way_and_handlers_are_put_back(number, whole, tmp_path):
    before = signal.getsignal(number)
    trainer = dropout_run(tmp_path)
    whole_step = trainer._step

    def interrupted_step(*args):
        if len(trainer.history) == 2:
            os.kill(os.getpid(), number)
        return whole_step(*args)

    trainer._step = interrupted_step
    with pytest.raises(KeyboardInterrupt, match="stopped after step 3"):
        trainer.run()
    assert signal.getsignal(number) is before
    assert trainer.checkpoints.latest().name == "step-00000003"
    resumed = dropout_run(tmp_path)
    assert_ends_as(whole, resumed, resumed.run(resume=True))


@pytest.mark.parametrize("moment", range(1, 9))
def test_a_signal_at_any_moment_leaves_the_checkpoint_that_it_names(moment, tmp_path):
    """The trainer looks several times a step whether to stop; the signal comes just before one of those looks."""

    class Stopping(Trainer):
        looks = 0

        @property
        def _stop(self):
            self.looks += 1
            return self.looks >= moment

        @_stop.setter
        def _stop(self, value):
            pass

    settings = TrainingArguments(steps=3, lanes=2, bptt=1, save_every=99, precision="float32")
    corpus = SmallCorpus(random_documents((30, 40)))
    trainer = Stopping(tiny_model(), corpus, settings, tmp_path, device="cpu")
    try:
        trainer.run()
        stopped = 3
    except KeyboardInterrupt as interrupt:
        stopped = int(str(interrupt).split("step ")[1].split(";")[0])
    latest = trainer.checkpoints.latest()
    assert (0 if latest is None else int(latest.name.removeprefix("step-"))) == stopped


def test_ctrl_c_in_the_last_step_is_not_swallowed(tmp_path):
    trainer = small_run(tiny_model(), tmp_path)
    whole_step = trainer._step

    def interrupted_step(*args):
        if len(trainer.history) == STEPS - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return whole_step(*args)

    trainer._step = interrupted_step
    with pytest.raises(KeyboardInterrupt, match="stopped after step 6"):
        trainer.run()
    assert len(small_run(tiny_model(), tmp_path).run(resume=True)) == STEPS


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    trainer = small_run(tiny_model(), tmp_path)

    def stuck_step(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on")

    trainer._step = stuck_step
    with pytest.raises(KeyboardInterrupt):
        trainer.run()


# ---- what is refused -------------------------------------------------------------------------------------------------


def diverging(trainer, *, step, how):
    """Spoil the run right before a step."""
    whole_step = trainer._step

    def spoiled_step(loss, *args):
        if len(trainer.history) + 1 == step:
            if how == "weight":
                with torch.no_grad():
                    trainer.model.transformer.h[0].mlp.c_fc.weight[0, 0] = math.nan
            elif how == "gradient":
                trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
            else:
                infinite = loss.forward
                loss.forward = lambda *inputs: tuple(
                    value * torch.tensor(math.inf) if place == 0 else value
                    for place, value in enumerate(infinite(*inputs))
                )
        return whole_step(loss, *args)

    trainer._step = spoiled_step


@pytest.mark.parametrize("how", ["weight", "loss", "gradient"])
def test_divergence_names_the_step_and_the_last_good_checkpoint(how, whole, tmp_path):
    trainer = dropout_run(tmp_path)
    diverging(trainer, step=4, how=how)
    with pytest.raises(InputError, match=r"diverged at step 4 .*step-00000002; lower --lr \(it was 3e-05\)"):
        trainer.run()
    assert trainer.checkpoints.latest().name == "step-00000002"
    weights = load_file(trainer.checkpoints.latest() / "model.safetensors")
    assert all(bool(weight.isfinite().all()) for weight in weights.values())
    resumed = dropout_run(tmp_path)
    assert_ends_as(whole, resumed, resumed.run(resume=True))


def test_divergence_before_any_checkpoint_says_so(tmp_path):
    trainer = small_run(tiny_model(), tmp_path)
    diverging(trainer, step=1, how="weight")
    with pytest.raises(InputError, match=r"diverged at step 1 .*no checkpoint was written yet"):
        trainer.run()


def test_the_log_of_a_diverged_run_is_complete(tmp_path):
    trainer = small_run(tiny_model(), tmp_path)
    diverging(trainer, step=4, how="loss")
    with pytest.raises(InputError):
        trainer.run()
    assert [step for step, _ in event_steps(tmp_path / "logs")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("field", "settings", "options"),
    [
        ("lanes", {"lanes": 2}, {}),
        ("bptt", {"bptt": 3}, {}),
        ("lr", {"lr": 1e-3}, {}),
        ("steps", {"steps": 7}, {}),
        ("seed", {"seed": 1}, {}),
        ("recurrent", {"recurrent": False}, {}),
        ("accumulate", {"accumulate": 2}, {}),
        ("window", {}, {"window": 7}),
        ("last_slots", {}, {"last_slots": 2, "position_offset": 4}),
        ("n_layer", {}, {"n_layer": 3, "insert_layers": [0, 1]}),
        ("n_inner", {}, {"n_inner": 64}),
        ("n_positions", {}, {"n_positions": 32}),
        ("activation_function", {}, {"activation_function": "relu"}),
        ("resid_pdrop", {}, {"dropout": 0.1}),
    ],
)
def test_a_run_of_other_settings_is_refused_and_the_field_named(field, settings, options, tmp_path):
    small_run(tiny_model(), tmp_path, steps=2).run()
    other = small_run(tiny_model(**options), tmp_path, **{"steps": 2} | settings)
    before = weights_of(other.model)
    with pytest.raises(InputError, match=rf"holds a run with {field}=.*, not .*resume with its settings"):
        other.run(resume=True)
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(other.model).items())


def test_a_run_over_other_documents_is_refused(tmp_path):
    small_run(tiny_model(), tmp_path, steps=2).run()
    other = SmallCorpus(random_documents((50, 40, 30)), fingerprint="other")
    with pytest.raises(InputError, match="data='small', not 'other'"):
        small_run(tiny_model(), tmp_path, steps=2, corpus=other).run(resume=True)


def test_a_new_run_does_not_mix_with_an_earlier_ones_checkpoints(tmp_path):
    small_run(tiny_model(), tmp_path).run()
    before = sorted((tmp_path / "checkpoints").rglob("*"))
    with pytest.raises(InputError, match=r"holds a run's checkpoints.*resume"):
        small_run(tiny_model(), tmp_path).run()
    assert sorted((tmp_path / "checkpoints").rglob("*")) == before


@pytest.mark.parametrize("field", ["steps", "lanes", "bptt", "accumulate", "save_every", "parallel_windows"])
@pytest.mark.parametrize("value", [0, -1])
def test_counts_below_one_are_refused(field, value):
    with pytest.raises(InputError, match=f"{field}={value} must be at least 1"):
        TrainingArguments(**{field: value})


@pytest.mark.parametrize("field", ["lr", "recurrence_lr", "clip"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_rates_that_are_not_positive_are_refused(field, value):
    with pytest.raises(InputError, match=f"{field}={value} must be positive"):
        TrainingArguments(**{field: value})


def test_more_lanes_than_documents_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="lanes=7 exceeds the 6 training documents"):
        small_run(tiny_model(), tmp_path, lanes=7).run()
    assert not list(tmp_path.rglob("step-*"))


# ---- what is new alone -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_steps_that_train_what_is_new_alone_may_read_no_memory(checkpointing, tmp_path):
    """The first windows of documents do not depend on it: nothing is learned from them, and the run goes on."""
    before = tiny_model()
    trainer = small_run(tiny_model(), tmp_path, bptt=1, steps=3, new_first_steps=3, checkpointing=checkpointing)
    trainer.run()
    weights, old = weights_of(trainer.model), weights_of(before)
    changed = {name for name in weights if not torch.equal(weights[name], old[name])}
    assert changed
    assert all(map(is_new, changed))
    assert all(parameter.requires_grad for parameter in trainer.model.parameters()), "all may learn again afterwards"


def test_an_interrupted_run_leaves_all_weights_free_to_learn(tmp_path):
    trainer = small_run(tiny_model(), tmp_path, steps=3, new_first_steps=3)
    trainer._stop = True
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def test_training_what_is_new_alone_is_refused_where_nothing_is(tmp_path):
    with pytest.raises(InputError, match="nothing is new in this model"):
        small_run(tiny_model(recurrence="none", last_slots=0), tmp_path, new_first_steps=2)


# ---- logs ------------------------------------------------------------------------------------------------------------


def test_every_step_is_in_the_tensorboard_log(tmp_path):
    history = small_run(tiny_model(), tmp_path).run()
    logged = event_steps(tmp_path / "logs")
    assert [step for step, _ in logged] == [row["step"] for row in history]
    assert [value for _, value in logged] == pytest.approx(losses_of(history), rel=1e-6)
    assert [step for step, _ in event_steps(tmp_path / "logs", "tokens_per_second")] == list(range(1, STEPS + 1))


def test_the_tensorboard_log_of_a_resumed_run_has_every_step_once(tmp_path):
    kill(small_run(tiny_model(), tmp_path), step=4, late=False)
    history = small_run(tiny_model(), tmp_path).run(resume=True)
    logged = event_steps(tmp_path / "logs")
    assert [step for step, _ in logged] == list(range(1, STEPS + 1))
    assert [value for _, value in logged] == pytest.approx(losses_of(history), rel=1e-6)


def test_the_model_is_left_in_evaluation_mode(whole):
    assert not whole.model.training
