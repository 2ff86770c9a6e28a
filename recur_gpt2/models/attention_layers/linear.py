"""The sums that linear attention begins a window with: of memory slots, of the window so far, of windows before.

B rows, W windows, T tokens a window, H heads, M slots, k features, d = D / H. S and z are kept side by side, "packed".
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.linear import LinearState, absorb
from ...ops.softmax import KeyValue
from ...utils.tensors import widen
from ..block import RecurGPT2Block
from ..windows import FreshWindows


def packed(state: LinearState) -> Tensor:
    """S (..., k, d) and z (..., k) -> (..., k, d + 1)."""
    return torch.cat((state[0], state[1][..., None]), dim=-1)


def unpacked(sums: Tensor | None) -> LinearState | None:
    """(..., k, d + 1) -> S (..., k, d) and z (..., k)."""
    return None if sums is None else (sums[..., :-1], sums[..., -1])


def linear_start(
    block: RecurGPT2Block,
    stretch: FreshWindows,
    name: str,
    key: Tensor,
    value: Tensor,
    memory: KeyValue | None,
    has_memory: bool | Tensor,
) -> LinearState | None:
    """(S, z) before the first of each window's tokens, (B, W, H, k, d) and (B, W, H, k); None for zeros.

    Args:
        key, value: features (B, W, H, T, k) and values (B, W, H, T, d) of the windows' tokens.
        memory: keys and values (B, W, H, M, d), which enter the sums first.
        has_memory: as `reads` tells it.
    """
    start = stretch.sums(name)
    if start is None and memory is not None and has_memory is not False:
        start = slot_sums(block, memory, has_memory)
    if stretch.fresh and block.state_decay is not None:
        several = key.shape[1] > 1
        own = packed(absorb(key.flatten(0, 1), value.flatten(0, 1))).unflatten(0, key.shape[:2]) if several else None
        start = carried(block, stretch, name, own, start)
    return unpacked(start)


def slot_sums(block: RecurGPT2Block, memory: KeyValue, has_memory: bool | Tensor) -> Tensor:
    """Sums over memory slots (B, W, H, M, d), where there is memory: (B, W, H, k, d + 1)."""
    key, value = (tensor.flatten(0, 1) for tensor in memory)
    mask = None if has_memory is True else has_memory[:, None].to(key.device)
    state = absorb(block.feature_map(key), value, mask=mask)
    return packed(state).unflatten(0, memory[0].shape[:2])


def carried(
    block: RecurGPT2Block, stretch: FreshWindows, name: str, own: Tensor | None, slots: Tensor | None
) -> Tensor | None:
    """The sums that each window begins with, where they are carried: (B, W, H, k, d + 1); None for zeros.

    A window begins with the decayed sums that the one before ended with, and its memory slots.

    Args:
        own: what each window adds to its sums, (B, W, H, k, d + 1); None for a single window.
        slots: sums over the slots of each window.
    """
    has_memory = stretch.has_memory.to(block.state_decay.device)[:, :, None, None, None]
    before = stretch.state.memory.get(f"linear.{name}")
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
