"""precision.py: the faster type is chosen by measuring, and measuring leaves no trace."""

import pytest
import torch
from helpers_training import RECURRENCES, tiny_model, weights_of

from recur_gpt2.errors import InputError
from recur_gpt2.training import precision
from recur_gpt2.training.precision import autocast_dtype


@pytest.mark.parametrize("faster", [None, torch.bfloat16], ids=str)
def test_auto_picks_the_type_that_took_less_time(faster, monkeypatch):
    monkeypatch.setattr(precision, "_seconds", lambda model, dtype, training: 1.0 if dtype is faster else 2.0)
    assert autocast_dtype(tiny_model(), "auto", training=True) is faster


@pytest.mark.parametrize(("name", "dtype"), [("float32", None), ("bfloat16", torch.bfloat16)])
def test_a_named_type_is_taken_without_measuring(name, dtype, monkeypatch):
    monkeypatch.setattr(precision, "_seconds", lambda *args: pytest.fail("measured"))
    assert autocast_dtype(tiny_model(), name, training=True) is dtype


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", RECURRENCES)
def test_measuring_uses_no_randomness_and_leaves_model_and_gradients_alone(kind, training):
    model = tiny_model(kind, dropout=0.5).train(training)
    before, randomness = weights_of(model), torch.get_rng_state()
    assert autocast_dtype(model, "auto", training=True) in (None, torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), randomness)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(model).items())
    assert model.training is training


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_what_is_measured_is_forward_and_backward_in_that_type(dtype, monkeypatch):
    """After one pass that does not count."""
    model = tiny_model()
    seen = []

    def watched(hidden, weight, targets, shares):
        enabled = torch.is_autocast_enabled("cpu")
        seen.append((enabled, torch.get_autocast_dtype("cpu") if enabled else None))
        loss = hidden.float().sum()
        loss.register_hook(lambda gradient: seen.append("backward"))
        return loss

    monkeypatch.setattr(precision, "summed_loss", watched)
    assert precision._seconds(model, dtype, True) > 0
    assert seen == [(dtype is not None, dtype), "backward"] * (1 + precision.TRIALS)


def test_for_reading_the_forward_pass_alone_is_timed(monkeypatch):
    model, seen = tiny_model(), []
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_: seen.append("backward"))
    assert autocast_dtype(model, "auto", training=False) in (None, torch.bfloat16)
    assert not seen
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_unknown_type_is_refused():
    with pytest.raises(InputError, match="precision='float8' is not known; use auto, float32 or bfloat16"):
        autocast_dtype(tiny_model(), "float8", training=True)
