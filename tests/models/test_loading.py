"""loading.py: the GPT-2 inside a model, and weights that are in memory once they are loaded."""

import sys

import pytest
import torch
from conftest import FORMS, WINDOW, random_gpt2, random_ids
from torch.testing import assert_close
from transformers import GPT2LMHeadModel

from recur_gpt2 import InputError, RecurGPT2LMHeadModel
from recur_gpt2.models.loading import load_any, plain_copy
from recur_gpt2.utils.measure import Meter, weight_bytes

LINEAR = {"linear_layers": [0, 2], "feature_map": "elu"}


@pytest.mark.parametrize("options", [FORMS["none"], FORMS["gated"], LINEAR], ids=["plain", "recurrent", "linear"])
@torch.no_grad()
def test_the_plain_copy_is_the_gpt2_that_a_model_was_made_from(options, gpt2_folder):
    model = RecurGPT2LMHeadModel.from_gpt2(gpt2_folder, window=WINDOW, **options)
    plain, gpt2 = plain_copy(model), GPT2LMHeadModel.from_pretrained(gpt2_folder)
    ids = random_ids(2, WINDOW)
    assert_close(plain(ids).logits, gpt2(ids).logits)
    weights, wanted = dict(plain.named_parameters()), dict(gpt2.named_parameters())
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], weight) for name, weight in wanted.items())
    assert all(weight.requires_grad for weight in weights.values())
    assert plain.lm_head.weight is plain.transformer.wte.weight, "tied weights stay tied"
    assert (plain.config.window, plain.config.is_recurrent, plain.config.linear_layers) == (WINDOW, False, [])
    assert not plain.training


def test_one_of_our_models_that_lacks_weights_is_refused(gpt2_folder, tmp_path):
    """transformers would make them up."""
    model = RecurGPT2LMHeadModel.from_gpt2(gpt2_folder, window=WINDOW)
    weights = {name: tensor for name, tensor in model.state_dict().items() if "recurrence" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(InputError, match="does not hold a whole model of recur_gpt2; it lacks"):
        load_any(tmp_path)


def test_the_plain_copy_holds_no_second_set_of_weights(gpt2_folder):
    model = RecurGPT2LMHeadModel.from_gpt2(gpt2_folder, window=WINDOW)
    weights = dict(model.named_parameters())
    for name, weight in plain_copy(model).named_parameters():
        assert weight.data_ptr() == weights[name].data_ptr()


@pytest.mark.parametrize("tied", [True, False])
def test_the_plain_copy_keeps_its_type_and_a_head_of_its_own(tied, gpt2_folder):
    options = {"window": WINDOW, "tie_word_embeddings": tied}
    model = RecurGPT2LMHeadModel.from_gpt2(gpt2_folder, **options).double()
    plain = plain_copy(model)
    assert plain.dtype == torch.float64
    assert (plain.lm_head.weight is plain.transformer.wte.weight) is tied
    assert torch.equal(plain.lm_head.weight, model.lm_head.weight)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is measured on Linux")
@pytest.mark.parametrize("kind", ["gpt2", "ours"])
@torch.no_grad()
def test_a_loaded_model_is_in_memory_before_it_is_used(kind, tmp_path):
    """Else the peak of what uses it first would hold the weights twice."""
    made = random_gpt2(n_embd=256, vocab_size=40_000)
    made.save_pretrained(tmp_path / "gpt2")
    RecurGPT2LMHeadModel.from_gpt2(tmp_path / "gpt2", window=WINDOW).save_pretrained(tmp_path / "ours")
    del made
    model = load_any(tmp_path / kind, WINDOW)
    with Meter(model) as measured:
        model(random_ids(1, WINDOW))
    assert measured.peak_memory_bytes < 1.5 * weight_bytes(model)
