"""Products of few rows give what the modules that they stand in for give, and nothing else takes their way."""

import pytest
import torch
from conftest import random_ids
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from recur_gpt2.models.outputs import CACHE
from recur_gpt2.ops import matmul
from recur_gpt2.ops.matmul import FEW_ROWS, Head, Projection

needs_onednn = pytest.mark.skipif(not matmul.ONEDNN, reason="this PyTorch was built without oneDNN")


class Calls(TorchDispatchMode):
    """Notes whether oneDNN's product was called."""

    def __init__(self):
        super().__init__()
        self.quick = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.quick |= func.namespace == "mkldnn"
        return func(*args, **(kwargs or {}))


def make_projection(inputs, outputs):
    layer = Conv1D(outputs, inputs)
    nn.init.normal_(layer.bias)
    return layer, Projection(layer)


def make_head(inputs, outputs):
    head = Head(inputs, outputs, bias=False)
    layer = nn.Linear(inputs, outputs, bias=False)
    layer.weight = head.weight
    return layer, head


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 5), (FEW_ROWS, 1), (FEW_ROWS + 1, 1), ()], ids=str)
@pytest.mark.parametrize("make", [make_projection, make_head])
@pytest.mark.parametrize("sizes", [(24, 40), (40, 24), (24, 24), (1, 7), (7, 1)], ids=str)
def test_the_result_is_that_of_the_module_itself(make, sizes, shape):
    layer, quick = make(*sizes)
    x = torch.randn(*shape, sizes[0])
    with torch.no_grad():
        torch.testing.assert_close(quick(x), layer(x))


def test_rows_that_do_not_lie_behind_each_other():
    layer, quick = make_projection(24, 16)
    x = torch.randn(6, 3, 24).transpose(0, 1)
    with torch.no_grad():
        torch.testing.assert_close(quick(x), layer(x.contiguous()))


@needs_onednn
@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS])
@pytest.mark.parametrize("make", [make_projection, make_head])
def test_few_rows_go_to_onednn(make, rows):
    _, quick = make(40, 24)
    with torch.no_grad(), Calls() as calls:
        quick(torch.randn(rows, 40))
    assert calls.quick


@pytest.mark.parametrize("make", [make_projection, make_head])
def test_everything_else_stays_where_it_was(make):
    _, quick = make(40, 24)
    few, many = torch.randn(2, 40), torch.randn(FEW_ROWS + 1, 40)
    with Calls() as calls:
        assert quick(few).requires_grad
        with torch.no_grad():
            quick(many)
            quick(few[:0])
            quick.double()(few.double())
    assert not calls.quick
    with torch.no_grad(), torch.autocast("cpu"):
        assert quick.float()(few).dtype == torch.bfloat16


def test_without_onednn_the_module_does_it_itself(monkeypatch):
    monkeypatch.setattr(matmul, "ONEDNN", False)
    layer, quick = make_head(40, 24)
    x = torch.randn(2, 40)
    with torch.no_grad(), Calls() as calls:
        assert torch.equal(quick(x), layer(x))
    assert not calls.quick


@pytest.mark.parametrize("broken", ["missing", "other arguments", "other numbers"])
def test_an_operator_that_is_not_what_it_was_is_not_used(broken, monkeypatch):
    def changed(rows, weight, bias):
        if broken == "missing":
            raise AttributeError("no such operator")
        if broken == "other arguments":
            raise RuntimeError("expected at most 5 arguments")
        return rows @ weight.T

    monkeypatch.setattr(matmul, "_onednn_product", changed)
    assert not matmul._has_onednn_product()


def test_without_the_operator_products_are_the_modules_own(make_model, monkeypatch):
    model, ids = make_model(dtype=torch.float32), random_ids(2, 11)
    with torch.no_grad():
        expected = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        monkeypatch.setattr(matmul, "ONEDNN", False)
        with Calls() as calls:
            assert model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0).equal(expected)
    assert not calls.quick


@needs_onednn
def test_a_token_of_a_model_goes_that_way_and_means_the_same(make_model):
    model, exact = make_model(dtype=torch.float32), make_model()
    ids = random_ids(2, 11)
    with torch.no_grad():
        cache = model(ids, use_cache=True)[CACHE]
        with Calls() as calls:
            logits = model(ids[:, :1], cache=cache, use_cache=True).logits
        assert calls.quick
        reread = exact(torch.cat((ids, ids[:, :1]), dim=1)).logits[:, -1:]
    torch.testing.assert_close(logits.double(), reread, rtol=1e-4, atol=1e-4)
