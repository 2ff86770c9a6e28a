"""Softmax attention to memory and to the window so far.

B rows, W windows, H heads, T tokens a window, M memory slots, n last positions, d = D / H.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from ...ops.softmax import KeyValue
from ..block import RecurGPT2Block
from ..window_memory import WindowMemory
from ..windows import NewWindows
from .positions import Positions, last_of

# Is shown the block, its queries and keys (B, W, H, T, d), the keys of its memory (B, W, H, M, d) or None, and the
# windows.
AttentionHook = Callable[[RecurGPT2Block, Tensor, Tensor, Tensor | None, NewWindows], None]


class SoftmaxAttention:
    """Buffers: keys and values of the memory, and behind them those of the window so far, (B, 2, H, M + T, d)."""

    def __init__(self, block: RecurGPT2Block, hook: AttentionHook | None = None):
        """`hook`: is shown what the layer attends to."""
        self.block, self.hook = block, hook

    def prefill(
        self, hidden: Tensor, windows: NewWindows, memory: WindowMemory
    ) -> tuple[Tensor, dict[str, tuple[Tensor, ...]]]:
        block = self.block
        query, key, value = block.project(hidden)
        key, value = windows.extend(block.name, key, value)
        memory.write(lambda: (key, value))
        slots = memory.read(value)
        if self.hook is not None:
            self.hook(block, query, key, None if slots is None else slots[0], windows)
        attended = windows.attend(query, key, value, slots, **block.attention_options)
        return attended, {block.name: (key, value)} if windows.has_unfinished else {}

    def allocate(self, rows: int, window: int, slots: int, last: int | None, like: Tensor) -> None:
        """Make the buffers.

        Args:
            slots: M, 0 where the layer reads no memory.
            last: n, last positions that the layer's memory is written from; None if it leaves none.
            like: of the type and device of keys and values.
        """
        self.slots, self.last = slots, last or 0
        heads, width = self.block.attn.num_heads, self.block.attn.head_dim
        self.positions = like.new_zeros(rows, 2, heads, slots + window, width)

    @property
    def buffers(self) -> list[Tensor]:
        return [self.positions]

    def step(self, hidden: Tensor, positions: Positions) -> Tensor:
        projected = self.block.project_together(hidden)
        query = projected[:, 0]
        positions.put(self.positions, self.slots, projected[:, 1:, :, 0])
        scale, end = self.block.attn.scaling, self.slots + max(positions.filled) + 1
        if positions.alike:
            start = 0 if positions.has_memory[0] else self.slots
            key, value = self.positions[..., start:end, :].unbind(1)
            return sdpa(query, key.to(query.dtype), value.to(query.dtype), scale=scale)
        index = torch.arange(end, device=positions.device)
        seen = index <= self.slots + positions.index[:, None]
        seen &= index >= self.slots * (1 - positions.reads)[:, None]
        key, value = self.positions[..., :end, :].unbind(1)
        return sdpa(query, key.to(query.dtype), value.to(query.dtype), attn_mask=seen[:, None, None], scale=scale)

    def last_positions(self, rows: Tensor) -> KeyValue:
        """Keys and values of the last n positions of full windows, (R, 1, H, n, d)."""
        return last_of(self.positions, rows, self.last)[:, None].unbind(2)

    def begin(self, rows: Tensor, memory: KeyValue | None, carried: Tensor | None) -> None:
        """A new window of some rows (R,), with memory (R, H, M, d)."""
        if memory is not None:
            self.positions[rows, :, :, : self.slots] = torch.stack(memory, dim=1).to(self.positions.dtype)

    def load(self, window: dict[str, Tensor], filled: list[int]) -> None:
        """Take what RecurState.window holds of rows whose windows have begun."""
        held = window[self.block.name]
        self.positions[:, :, :, self.slots : self.slots + held.shape[3]] = held.to(self.positions.dtype)

    def save(self, filled: list[int]) -> dict[str, Tensor]:
        """What RecurState.window holds."""
        longest = max(filled)
        inside = torch.arange(longest) < torch.tensor(filled)[:, None]
        held = self.positions[:, :, :, self.slots : self.slots + longest]
        return {self.block.name: held * inside[:, None, None, :, None].to(held.device)}
