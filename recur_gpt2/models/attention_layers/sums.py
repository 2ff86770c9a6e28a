"""The sums (S, z) that linear attention begins a window with: of memory slots, and of the windows before.

S and z are kept side by side, "packed". B rows, W windows, H heads, M slots, k features, d = D / H.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.linear import LinearState, absorb
from ...ops.softmax import KeyValue
from ...utils.tensors import widen
from ..block import RecurGPT2Block
from ..window_memory import WindowMemory
from ..windows import NewWindows


def packed(state: LinearState) -> Tensor:
    """S (..., k, d) and z (..., k) -> (..., k, d + 1)."""
    return torch.cat((state[0], state[1][..., None]), dim=-1)


def unpacked(sums: Tensor | None) -> LinearState | None:
    """(..., k, d + 1) -> S (..., k, d) and z (..., k)."""
    return None if sums is None else (sums[..., :-1], sums[..., -1])


def slot_sums(block: RecurGPT2Block, memory: KeyValue, has_memory: bool | Tensor) -> Tensor:
    """Sums over memory slots (B, W, H, M, d), where there is memory: (B, W, H, k, d + 1)."""
    key, value = (tensor.flatten(0, 1) for tensor in memory)
    mask = None if has_memory is True else has_memory[:, None].to(key.device)
    state = absorb(block.feature_map(key), value, mask=mask)
    return packed(state).unflatten(0, memory[0].shape[:2])


def with_carried(
    block: RecurGPT2Block, windows: NewWindows, memory: WindowMemory, own: Tensor | None, slots: Tensor | None
) -> Tensor | None:
    """The sums that new windows begin with, where they are carried: (B, W, H, k, d + 1); None for zeros.

    A window begins with the decayed sums that the one before ended with, and its memory slots.

    Args:
        own: what each window adds to its sums, (B, W, H, k, d + 1); None for a single window.
        slots: sums over the slots of each window.
    """
    has_memory = windows.has_memory.to(block.state_decay.device)[:, :, None, None, None]
    before = memory.carried
    if before is None and own is None:
        return slots
    decay = widen(block.state_decay).sigmoid()[:, None, None]
    before = torch.zeros_like(own[:, 0]) if before is None else before
    starts = []
    for window in range(has_memory.shape[1]):
        start = decay * before * has_memory[:, window]
        start = start if slots is None else start + slots[:, window]
        starts.append(start)
        before = start if own is None else start + own[:, window]
    return torch.stack(starts, dim=1)
