"""Linear attention (T2R): sums over memory and the window so far, whatever their length.

B rows, W windows, H heads, T tokens a window, n last positions, k features, d = D / H.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.linear import LinearState, absorb, step
from ...ops.softmax import KeyValue
from ...utils.tensors import widen
from ..block import RecurGPT2Block
from ..window_memory import WindowMemory
from ..windows import NewWindows
from .positions import Positions, where_begun
from .sums import packed, slot_sums, unpacked, with_carried


class LinearAttention:
    """Buffers: sums over memory and the window so far (B, H, k, d + 1), and a ring of the last n keys and values."""

    def __init__(self, block: RecurGPT2Block):
        self.block = block

    def prefill(
        self, hidden: Tensor, windows: NewWindows, memory: WindowMemory
    ) -> tuple[Tensor, dict[str, tuple[Tensor, ...]]]:
        block, count, length = self.block, memory.last_positions, hidden.shape[2]
        whole = windows.are_new and not windows.has_unfinished
        wanted = slice(length - count, length) if whole else slice(None)
        query, key, value, raw = block.project_features(hidden, wanted if memory.is_written else None)
        memory.write(lambda: windows.last_positions(block.name, raw, value, count))
        start = self._start(windows, memory, key, value)
        attended, state = windows.attend_linearly(query, key, value, start, block.feature_map.floor)
        memory.carry(lambda: packed(state))
        kept = {}
        if windows.has_unfinished:
            kept[f"linear.{block.name}"] = (packed(state),)
            if memory.is_written:
                kept[f"tail.{block.name}"] = (windows.tails(block.name, raw, value, count),)
        return attended, kept

    def _start(self, windows, memory, key, value) -> LinearState | None:
        """(S, z) before the first of each window's tokens, (B, W, H, k, d) and (B, W, H, k); None for zeros."""
        if not windows.are_new:  # their sums have the memory in them already
            return unpacked(windows.sums(self.block.name))
        slots = memory.read(value)
        start = None if slots is None or windows.reads is False else slot_sums(self.block, slots, windows.reads)
        if self.block.state_decay is not None:
            several = key.shape[1] > 1
            own = packed(absorb(key.flatten(0, 1), value.flatten(0, 1))) if several else None
            own = own.unflatten(0, key.shape[:2]) if several else None
            start = with_carried(self.block, windows, memory, own, start)
        return unpacked(start)

    def allocate(self, rows: int, window: int, slots: int, last: int | None, like: Tensor) -> None:
        """Make the buffers; arguments as those of SoftmaxAttention."""
        self.window, self.last, self.leaves_memory = window, last or 0, last is not None
        heads, width = self.block.attn.num_heads, self.block.attn.head_dim
        self.sums = widen(like).new_zeros(rows, heads, self.block.feature_map.out_features, width + 1)
        self.ring = like.new_zeros(rows, 2, heads, self.last, width)

    @property
    def buffers(self) -> list[Tensor]:
        return [self.sums, self.ring]

    def step(self, hidden: Tensor, positions: Positions) -> Tensor:
        query, key, value, raw = self.block.project_features(hidden, slice(None) if self.last else None)
        if self.last:
            positions.put(self.ring, 0, torch.stack((raw[:, :, 0], value[:, :, 0]), dim=1), modulus=self.last)
        attended, state = step(query, key, value, unpacked(self.sums), floor=self.block.feature_map.floor)
        self.sums.copy_(packed(state))
        return attended

    def last_positions(self, rows: Tensor) -> KeyValue:
        order = self._order([self.window] * len(rows))
        return self._in_order(self.ring[rows], order)[:, None].unbind(2)

    def total(self, rows: Tensor) -> Tensor:
        """(R, H, k, d + 1), sums over full windows."""
        return self.sums[rows]

    def begin(self, rows: Tensor, memory: KeyValue | None, carried: Tensor | None) -> None:
        self.sums[rows] = 0
        self.ring[rows] = 0
        if memory is not None:
            self.sums[rows] = slot_sums(self.block, tuple(each[:, None] for each in memory), True)[:, 0]
        if carried is not None:
            self.sums[rows] += carried

    def load(self, window: dict[str, Tensor], filled: list[int]) -> None:
        name = self.block.name
        self.sums.copy_(where_begun(filled, window[f"linear.{name}"], self.sums))
        if self.last:
            index = self._order(filled).view(len(filled), 1, 1, self.last, 1).expand_as(self.ring)
            self.ring.copy_(self.ring.scatter(3, index, window[f"tail.{name}"].to(self.ring.dtype)))

    def save(self, filled: list[int]) -> dict[str, Tensor]:
        name = self.block.name
        held = {f"linear.{name}": where_begun(filled, self.sums)}
        if self.leaves_memory:
            before = torch.tensor(filled)[:, None] - self.last + torch.arange(self.last)  # positions, if not negative
            inside = (before >= 0).to(self.ring.device)
            held[f"tail.{name}"] = self._in_order(self.ring, self._order(filled)) * inside[:, None, None, :, None]
        return held

    def _order(self, filled):
        """(B, n), where in the ring the last n positions are."""
        return ((torch.tensor(filled)[:, None] + torch.arange(self.last)) % max(1, self.last)).to(self.ring.device)

    def _in_order(self, ring, order):
        return ring.gather(3, order.view(len(ring), 1, 1, self.last, 1).expand_as(ring))
