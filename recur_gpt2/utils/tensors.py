"""Types of tensors, and what all that compute losses agree on."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

IGNORE_INDEX = -100  # a target that is not scored, as in transformers


def widen(tensor: Tensor) -> Tensor:
    """16-bit types in float32, others as they are: for sums that must not lose what is small."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def in_full(device: torch.device) -> AbstractContextManager:
    """Where products are in the type of what they multiply, under autocast too."""
    has_autocast = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if has_autocast else nullcontext()


def product_type(weight: Tensor) -> torch.dtype:
    """What products with this weight come out in, and keys and values are kept in: autocast's type, if there is one."""
    device = weight.device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if casts else weight.dtype
