"""Few rows times a weight matrix on a CPU: what writing tokens is made of.

PyTorch gives float32 products to MKL, which on an AMD EPYC reads a matrix for one row with one thread, if its rows are
the outputs, and takes two to three times as long for 2 to 32 rows as oneDNN, which PyTorch brings too: that one reads
as fast as memory gives (docs/generation.md). PyTorch's own compiler calls it by the operator used here, which is
private: where it is missing or gives something else, products are the modules' own. Run with PyTorch 2.11 to 2.14.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula
from transformers.pytorch_utils import Conv1D

FEW_ROWS = 32  # more are read a window at a time, whose memory is fitted (memory.py) with PyTorch's choice


def _onednn_product(rows, weight, bias):
    """(n, in) x (out, in) -> (n, out)"""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def _has_onednn_product():
    """Whether the operator is there and is what it was."""
    if not torch.backends.mkldnn.is_available():
        return False
    rows, weight, bias = torch.ones(2, 3), torch.arange(12.0).view(4, 3), torch.arange(4.0)
    try:
        return torch.allclose(_onednn_product(rows, weight, bias), nn.functional.linear(rows, weight, bias))
    except (AttributeError, RuntimeError, TypeError):
        return False


def has_bfloat16_products() -> bool:
    """Whether this processor has products in bfloat16, as far as PyTorch tells."""
    try:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):
        return False


ONEDNN = _has_onednn_product()


class Projection(Conv1D):
    """transformers' Conv1D, faster for few rows."""

    def __init__(self, layer: Conv1D):
        """
        Args:
            layer: whose parameters it takes over.
        """
        nn.Module.__init__(self)
        self.nf, self.nx, self.weight, self.bias = layer.nf, layer.nx, layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        if has_few_rows(x, self.weight) and not self._is_fast_already(x):
            return few_rows_product(x, self.weight.T, self.bias)
        return super().forward(x)

    def _is_fast_already(self, x):
        """One row times a wide matrix that lies input by input, which MKL reads with all threads."""
        return x.numel() == self.nx <= self.nf


class Head(nn.Linear):
    """PyTorch's Linear, faster for few rows."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        return few_rows_product(x, self.weight, self.bias) if has_few_rows(x, self.weight) else super().forward(x)


def weight_of(linear: nn.Module) -> Tensor:
    """(out, in), what a linear layer without bias multiplies by, differentiable in its parameters.

    That of a layer that something was put around (LoRA, quantisation) is what it gives for the unit vectors.
    """
    if type(linear) in (nn.Linear, Head):
        return linear.weight
    like = next(linear.parameters(), torch.empty(0))
    return linear(torch.eye(linear.in_features, dtype=like.dtype, device=like.device)).T


def has_few_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether `few_rows_product` is the faster way, and there is nothing that it cannot do: gradients, autocast."""
    if torch.is_grad_enabled() or not ONEDNN or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    return x.dtype == weight.dtype == torch.float32 and 0 < x.numel() <= FEW_ROWS * x.shape[-1]


def few_rows_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., in) x (out, in) -> (..., out), as torch.nn.functional.linear."""
    rows = x.reshape(-1, x.shape[-1])
    return _onednn_product(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])


if ONEDNN:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x, weight, *_, **__) -> int:
        """What torch's FlopCounterMode counts for two shapes; it would miss the product otherwise."""
        return 2 * prod(x) * weight[0]
