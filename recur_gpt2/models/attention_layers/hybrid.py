"""Windows in a layer that attends to near places by softmax: what stands in front of their tokens, and what they leave.

Memory slots are places in front of a window, near to its first tokens and far from the others; so are, in a window that
is read on, the tokens read before. B rows, W windows, T tokens, H heads, w near places, n places kept, M slots,
k features, d = D / H.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ...ops.hybrid import near_attention
from ...ops.linear import absorb
from ...ops.softmax import KeyValue
from ..block import RecurGPT2Block
from ..windows import FreshWindows, ending_at
from .linear import carried, packed, slot_sums, unpacked


class NearWindows:
    """Some windows of a stretch in one layer, with the places in front of them."""

    def __init__(
        self,
        block: RecurGPT2Block,
        stretch: FreshWindows,
        name: str,
        key: Tensor,
        value: Tensor,
        memory: KeyValue | None,
        has_memory: bool | Tensor,
        windows: slice = slice(None),
        *,
        slots: int,
        kept: int = 0,
    ):
        """
        Args:
            key, value: (B, W, H, T, d) of the tokens.
            memory: keys and values (B, W, H, M, d) of windows that begin, or None.
            has_memory: as `reads` tells it.
            windows: which windows of the stretch these are.
            slots: M, also where the window has begun.
            kept: least number of last places to keep.
        """
        self.block, self.stretch, self.windows = block, stretch, windows
        self.near = block.far_gate.near_tokens
        self.kept = max(self.near, kept)
        front, count = stretch.front(name, memory, has_memory, slots, key, self.kept)
        self.places = torch.cat((front, torch.stack((key, value), dim=2).to(front.dtype)), dim=4)
        self.mask = self._mask(count, key)
        self.start = self._start(name, memory, has_memory)

    def attend(self, query: Tensor) -> Tensor:
        """(B, W, H, T, d) -> (B, W, H, T, d)"""
        block, length = self.block, query.shape[3]
        key, value = (each.flatten(0, 1) for each in self._near_places())
        query = (query * block.query_factor).flatten(0, 1)
        features = block.feature_map.features(query, key[:, :, :length])
        scaled = query * block.attn.head_dim**-0.5
        start = None if self.start is None else tuple(each.flatten(0, 1) for each in unpacked(self.start))
        out = near_attention(
            scaled,
            key,
            value,
            *features,
            block.far_gate(scaled),
            start,
            mask=self.mask.to(query.device),
            floor=block.feature_map.floor,
        )
        return out.unflatten(0, self.places.shape[:2])

    def sums(self) -> Tensor:
        """(B, W, H, k, d + 1), sums of all but the last w places of unfinished windows."""
        length = self.places.shape[4] - self.kept  # T, and so the most that can leave
        key, value = (each[:, :, :, :length] for each in self._near_places())
        left = torch.tensor(self.stretch.read_now)[:, None, None] > torch.arange(length)
        mask = self.mask[:, :length] & left.expand(*key.shape[:2], -1).flatten(0, 1)
        return self._absorbed(key, value, mask, self.start)

    def sums_of_all(self) -> Tensor:
        """(B, W, H, k, d + 1), sums of all places."""
        return self._own if self.start is None else self.start + self._own

    @cached_property
    def _own(self):
        """What all these places add to the sums, (B, W, H, k, d + 1)."""
        return self._absorbed(*self._near_places(), self.mask, None)

    def tails(self) -> Tensor:
        """(B, W, 2, H, n, d), the last places of unfinished windows."""
        return ending_at(self.places, self.stretch.read_now, self.kept)

    def _near_places(self):
        return self.places[:, :, :, :, self.kept - self.near :].unbind(2)

    def _mask(self, count, key):
        """(B * W, w + T) bool, whether there is anything."""
        rows, windows, _, length, _ = key.shape
        count = torch.as_tensor(count).expand(rows * windows)
        in_front = torch.arange(self.near) >= self.near - count[:, None]
        tokens = ~self.stretch.pads(length)[:, self.windows].flatten(0, 1)
        return torch.cat((in_front, tokens), dim=1)

    def _start(self, name, memory, has_memory):
        """(B, W, H, k, d + 1), sums of what is before the near places of the first token; None for zeros."""
        if not self.stretch.fresh:
            return self.stretch.sums(name)
        early = None if memory is None else tuple(each[:, :, :, : -self.near] for each in memory)
        start = None
        if early is not None and early[0].shape[3]:
            start = slot_sums(self.block, early, has_memory)
        if self.block.state_decay is None:
            return start
        return carried(self.block, self.stretch, name, self._own if self.places.shape[1] > 1 else None, start)

    def _absorbed(self, key, value, mask, start):
        """The sums that these places (B, W, H, n, d) are added to, with them."""
        flat = None if start is None else tuple(each.flatten(0, 1) for each in unpacked(start))
        features = self.block.feature_map(key.flatten(0, 1))
        sums = absorb(features, value.flatten(0, 1), flat, mask=mask.to(key.device))
        return packed(sums).unflatten(0, key.shape[:2])
