"""The sliding-window hybrid: softmax attention to the nearest positions, linear attention to all before them.

Memory slots are positions before a window, near to its first tokens and far from the others; so are, in a window that
is read on, the tokens read before. B rows, W windows, T tokens, H heads, w positions of the sliding window, n positions
kept, M slots, k features, d = D / H.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ...ops.hybrid import hybrid_attention
from ...ops.linear import absorb
from ...ops.softmax import KeyValue
from ...utils.tensors import widen
from ..block import RecurGPT2Block
from ..window_memory import WindowMemory
from ..windows import NewWindows, ending_at
from .positions import Positions, last_of, where_begun
from .sums import packed, slot_sums, unpacked, with_carried


class HybridAttention:
    """Buffers: memory slots that are near and the window so far (B, 2, H, n + T, d), and sums over all positions that
    are not near (B, H, k, d + 1)."""

    def __init__(self, block: RecurGPT2Block):
        self.block, self.near = block, block.far_gate.near_tokens

    def prefill(
        self, hidden: Tensor, windows: NewWindows, memory: WindowMemory
    ) -> tuple[Tensor, dict[str, tuple[Tensor, ...]]]:
        name = self.block.name
        query, key, value = self.block.project(hidden)
        memory.write(lambda: windows.last_positions(name, key, value, memory.last_positions))
        prefixed = _PrefixedWindows(self.block, windows, memory, key, value)
        attended = prefixed.attend(query)
        memory.carry(prefixed.sums_of_all)
        if not windows.has_unfinished:
            return attended, {}
        return attended, {f"linear.{name}": (prefixed.sums(),), f"tail.{name}": (prefixed.tails(),)}

    def allocate(self, rows: int, window: int, slots: int, last: int | None, like: Tensor) -> None:
        """Make the buffers; arguments as those of SoftmaxAttention."""
        self.slots, self.last = slots, last or 0
        self.kept = max(self.near, self.last)
        heads, width = self.block.attn.num_heads, self.block.attn.head_dim
        self.sums = widen(like).new_zeros(rows, heads, self.block.feature_map.out_features, width + 1)
        self.positions = like.new_zeros(rows, 2, heads, self.kept + window, width)

    @property
    def buffers(self) -> list[Tensor]:
        return [self.sums, self.positions]

    def step(self, hidden: Tensor, positions: Positions) -> Tensor:
        block = self.block
        projected = block.project_together(hidden)
        query = projected[:, 0]
        positions.put(self.positions, self.kept, projected[:, 1:, :, 0])
        key, value = self._near_positions(positions).to(query.dtype).unbind(1)
        query = query * block.query_factor
        features = block.feature_map.features(query, key[:, :, :1])
        scaled = query * block.attn.head_dim**-0.5
        mask = self._mask(positions)
        options = {"mask": mask, "floor": block.feature_map.floor}
        out = hybrid_attention(scaled, key, value, *features, block.far_gate(scaled), unpacked(self.sums), **options)
        leaving = absorb(features[1], value[:, :, :1], unpacked(self.sums), mask=mask[:, :1])
        self.sums.copy_(packed(leaving))
        return out

    def last_positions(self, rows: Tensor) -> KeyValue:
        return last_of(self.positions, rows, self.last)[:, None].unbind(2)

    def total(self, rows: Tensor) -> Tensor:
        key, value = last_of(self.positions, rows, self.near).unbind(1)
        return packed(absorb(self.block.feature_map(key), value, unpacked(self.sums[rows])))

    def begin(self, rows: Tensor, memory: KeyValue | None, carried: Tensor | None) -> None:
        self.sums[rows] = 0
        self.positions[rows, :, :, : self.kept] = 0
        if memory is not None:
            slots = min(self.kept, self.slots)
            last = torch.stack(memory, dim=1)[..., self.slots - slots :, :]
            self.positions[rows, :, :, self.kept - slots : self.kept] = last.to(self.positions.dtype)
            early = tuple(each[:, None, :, : -self.near] for each in memory)
            if early[0].shape[3]:
                self.sums[rows] = slot_sums(self.block, early, True)[:, 0]
        if carried is not None:
            self.sums[rows] += carried

    def load(self, window: dict[str, Tensor], filled: list[int]) -> None:
        name = self.block.name
        self.sums.copy_(where_begun(filled, window[f"linear.{name}"], self.sums))
        tail = window[f"tail.{name}"].to(self.positions.dtype)
        for row, count in enumerate(filled):
            if count:
                self.positions[row, :, :, count : count + self.kept] = tail[row]

    def save(self, filled: list[int]) -> dict[str, Tensor]:
        name = self.block.name
        tails = [self.positions[row, :, :, count : count + self.kept] for row, count in enumerate(filled)]
        held = {f"linear.{name}": where_begun(filled, self.sums)}
        return held | {f"tail.{name}": where_begun(filled, torch.stack(tails))}

    def _near_positions(self, positions):
        """(B, 2, H, w + 1, d), those near the new token behind the one that has just left them."""
        first = self.kept - self.near
        if positions.alike:
            first += positions.filled[0]
            return self.positions[..., first : first + self.near + 1, :]
        index = first + positions.index[:, None] + torch.arange(self.near + 1, device=positions.device)
        shape = *self.positions.shape[:3], self.near + 1, self.positions.shape[4]
        return self.positions.gather(3, index[:, None, None, :, None].expand(shape))

    def _mask(self, positions):
        """(B, w + 1) bool, where there is something: memory in front, or a token."""
        offsets = torch.arange(self.near + 1, device=positions.device)
        index = self.kept - self.near + positions.index[:, None] + offsets
        return index >= self.kept - min(self.kept, self.slots) * positions.reads[:, None]


class _PrefixedWindows:
    """A block of windows with the positions before them."""

    def __init__(self, block: RecurGPT2Block, windows: NewWindows, memory: WindowMemory, key: Tensor, value: Tensor):
        """`key`, `value`: (B, W, H, T, d) of the tokens."""
        self.block, self.windows, self.memory = block, windows, memory
        self.near = block.far_gate.near_tokens
        self.kept = max(self.near, memory.last_positions)
        slots = memory.read(value) if windows.are_new else None  # windows begun have it in their prefix already
        prefix, count = windows.prefix(block.name, slots, memory.slots, key, self.kept)
        self.positions = torch.cat((prefix, torch.stack((key, value), dim=2).to(prefix.dtype)), dim=4)
        self.mask = self._mask(count, key)
        self.start = self._start(slots)

    def attend(self, query: Tensor) -> Tensor:
        """(B, W, H, T, d) -> (B, W, H, T, d)"""
        block, length = self.block, query.shape[3]
        key, value = (each.flatten(0, 1) for each in self._near_positions())
        query = (query * block.query_factor).flatten(0, 1)
        features = block.feature_map.features(query, key[:, :, :length])
        scaled = query * block.attn.head_dim**-0.5
        start = None if self.start is None else tuple(each.flatten(0, 1) for each in unpacked(self.start))
        options = {"mask": self.mask.to(query.device), "floor": block.feature_map.floor}
        out = hybrid_attention(scaled, key, value, *features, block.far_gate(scaled), start, **options)
        return out.unflatten(0, self.positions.shape[:2])

    def sums(self) -> Tensor:
        """(B, W, H, k, d + 1), sums of all but the last w positions of unfinished windows."""
        length = self.positions.shape[4] - self.kept  # T, and so the most that can leave
        key, value = (each[:, :, :, :length] for each in self._near_positions())
        left = torch.tensor(self.windows.read_now)[:, None, None] > torch.arange(length)
        mask = self.mask[:, :length] & left.expand(*key.shape[:2], -1).flatten(0, 1)
        return self._absorbed(key, value, mask, self.start)

    def sums_of_all(self) -> Tensor:
        """(B, W, H, k, d + 1), sums of all positions."""
        return self._own if self.start is None else self.start + self._own

    @cached_property
    def _own(self):
        """What all these positions add to the sums, (B, W, H, k, d + 1)."""
        return self._absorbed(*self._near_positions(), self.mask, None)

    def tails(self) -> Tensor:
        """(B, W, 2, H, n, d), the last positions of unfinished windows."""
        return ending_at(self.positions, self.windows.read_now, self.kept)

    def _near_positions(self):
        return self.positions[:, :, :, :, self.kept - self.near :].unbind(2)

    def _mask(self, count, key):
        """(B * W, w + T) bool, whether there is anything."""
        rows, windows, _, length, _ = key.shape
        count = torch.as_tensor(count).expand(rows * windows)
        before = torch.arange(self.near) >= self.near - count[:, None]
        tokens = ~self.windows.pads(length).flatten(0, 1)
        return torch.cat((before, tokens), dim=1)

    def _start(self, slots):
        """(B, W, H, k, d + 1), sums of what is before the positions near the first token; None for zeros."""
        if not self.windows.are_new:
            return self.windows.sums(self.block.name)
        early = None if slots is None else tuple(each[:, :, :, : -self.near] for each in slots)
        start = None
        if early is not None and early[0].shape[3]:
            start = slot_sums(self.block, early, self.windows.reads)
        if self.block.state_decay is None:
            return start
        several = self.positions.shape[1] > 1
        return with_carried(self.block, self.windows, self.memory, self._own if several else None, start)

    def _absorbed(self, key, value, mask, start):
        """The sums that these positions (B, W, H, n, d) are added to, with them."""
        flat = None if start is None else tuple(each.flatten(0, 1) for each in unpacked(start))
        features = self.block.feature_map(key.flatten(0, 1))
        sums = absorb(features, value.flatten(0, 1), flat, mask=mask.to(key.device))
        return packed(sums).unflatten(0, key.shape[:2])
