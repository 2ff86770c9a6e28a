"""What transformers and PyTorch do to a model from outside: shards, device maps, int8, compilation."""

import warnings

import pytest
import torch
from conftest import WINDOW
from torch.testing import assert_close

from recur_gpt2 import RecurGPT2LMHeadModel

IDS = torch.arange(1, 3 * WINDOW + 4).remainder(97).view(1, -1)


def test_shards_and_device_maps_load_the_same_model(make_model, tmp_path):
    model = make_model("default", torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for device_map in ("cpu", "auto", {"": "cpu"}):
        loaded = RecurGPT2LMHeadModel.from_pretrained(tmp_path, device_map=device_map).eval()
        assert_close(loaded(IDS).logits, model(IDS).logits)


def test_dynamic_int8_computes_nearly_the_same(make_model):
    model = make_model("default", torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch announces its successor
        quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear, type(model.lm_head)})
    expected = model(IDS, labels=IDS)
    found = quantised(IDS, labels=IDS)
    assert_close(found.loss, expected.loss, atol=0.02, rtol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default", "yoshida2020"])
def test_a_compiled_model_gives_the_same(make_model, name):
    model = make_model(name, torch.float32)
    torch.compiler.reset()
    assert_close(torch.compile(model)(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)
