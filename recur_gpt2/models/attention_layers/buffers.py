"""What each layer keeps between two tokens, in buffers that are made once and written in place.

A layer's buffers hold the window so far and the memory in front of it. Each kind of attention has its own; all have the
same methods, which `decoding.Decoder` calls. What they save and load are RecurState's tensors.

B rows, H heads, T tokens a window, M memory slots, n last positions, w near places, k features, d = D / H.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from ...ops.hybrid import near_attention
from ...ops.linear import absorb, step
from ...ops.softmax import KeyValue
from ...utils.tensors import widen
from ..block import RecurGPT2Block
from .linear import packed, slot_sums, unpacked


@dataclass(frozen=True)
class Places:
    """Where the rows' next tokens stand.

    Attributes:
        filled: B numbers, tokens that each row's window holds.
        has_memory: B truth values.
        device: of the buffers.
    """

    filled: list[int]
    has_memory: list[bool]
    device: torch.device

    @cached_property
    def alike(self) -> bool:
        """Whether one number says it for all rows."""
        return len(set(self.filled)) == 1 and len(set(self.has_memory)) == 1

    @cached_property
    def rows(self) -> Tensor:
        """(B,) int64, to index rows with."""
        return torch.arange(len(self.filled), device=self.device)

    @cached_property
    def index(self) -> Tensor:
        """(B,) int64 `filled`, on the buffers' device."""
        return torch.tensor(self.filled, device=self.device)

    @cached_property
    def reads(self) -> Tensor:
        """(B,) int64, 1 where there is memory."""
        return torch.tensor(self.has_memory, device=self.device).long()

    def put(self, buffer: Tensor, first: int, values: Tensor, modulus: int | None = None) -> None:
        """Write (B, ..., d) values behind what each row holds: buffer (B, ..., N, d) at `first + filled`.

        `modulus`: of `filled`, for a ring.
        """
        if self.alike:
            place = self.filled[0] if modulus is None else self.filled[0] % modulus
            buffer[..., first + place, :] = values
        else:
            place = self.index if modulus is None else self.index % modulus
            buffer.movedim(-2, 1)[self.rows, first + place] = values.to(buffer.dtype)


class SoftmaxLayer:
    """Keys and values of the memory, and behind them those of the window so far: (B, 2, H, M + T, d)."""

    def __init__(self, block: RecurGPT2Block, rows: int, window: int, slots: int, last: int | None, like: Tensor):
        self.block, self.slots, self.last = block, slots, last or 0
        heads, width = block.attn.num_heads, block.attn.head_dim
        self.places = like.new_zeros(rows, 2, heads, slots + window, width)

    @property
    def buffers(self) -> list[Tensor]:
        return [self.places]

    def attend(self, hidden: Tensor, places: Places) -> Tensor:
        """(B, 1, D) layer input -> (B, H, 1, d)"""
        projected = self.block.project_together(hidden)
        query = projected[:, 0]
        places.put(self.places, self.slots, projected[:, 1:, :, 0])
        scale, end = self.block.attn.scaling, self.slots + max(places.filled) + 1
        if places.alike:
            start = 0 if places.has_memory[0] else self.slots
            key, value = self.places[..., start:end, :].unbind(1)
            return sdpa(query, key.to(query.dtype), value.to(query.dtype), scale=scale)
        place = torch.arange(end, device=places.device)
        seen = (place <= self.slots + places.index[:, None]) & (place >= self.slots * (1 - places.reads)[:, None])
        key, value = self.places[..., :end, :].unbind(1)
        return sdpa(query, key.to(query.dtype), value.to(query.dtype), attn_mask=seen[:, None, None], scale=scale)

    def last_positions(self, rows: Tensor) -> KeyValue:
        """Keys and values of the last n positions of full windows, (R, 1, H, n, d)."""
        return _last_places(self.places, rows, self.last)[:, None].unbind(2)

    def begin(self, rows: Tensor, memory: KeyValue | None, carried: Tensor | None) -> None:
        """A new window of some rows (R,), with memory (R, H, M, d)."""
        if memory is not None:
            self.places[rows, :, :, : self.slots] = torch.stack(memory, dim=1).to(self.places.dtype)

    def load(self, window: dict[str, Tensor], name: str, filled: list[int]) -> None:
        """Take what RecurState.window holds of rows whose windows have begun."""
        held = window[name]
        self.places[:, :, :, self.slots : self.slots + held.shape[3]] = held.to(self.places.dtype)

    def save(self, name: str, filled: list[int]) -> dict[str, Tensor]:
        """What RecurState.window holds."""
        longest = max(filled)
        inside = torch.arange(longest) < torch.tensor(filled)[:, None]
        held = self.places[:, :, :, self.slots : self.slots + longest]
        return {name: held * inside[:, None, None, :, None].to(held.device)}


class LinearLayer:
    """Sums over the window so far and its memory (B, H, k, d + 1), and a ring of the last n keys and values."""

    def __init__(self, block: RecurGPT2Block, rows: int, window: int, slots: int, last: int | None, like: Tensor):
        self.block, self.window, self.last, self.leaves_memory = block, window, last or 0, last is not None
        heads, width, features = block.attn.num_heads, block.attn.head_dim, block.feature_map.out_features
        self.sums = widen(like).new_zeros(rows, heads, features, width + 1)
        self.ring = like.new_zeros(rows, 2, heads, self.last, width)

    @property
    def buffers(self) -> list[Tensor]:
        return [self.sums, self.ring]

    def attend(self, hidden: Tensor, places: Places) -> Tensor:
        query, key, value, raw = self.block.project_features(hidden, slice(None) if self.last else None)
        if self.last:
            places.put(self.ring, 0, torch.stack((raw[:, :, 0], value[:, :, 0]), dim=1), modulus=self.last)
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

    def load(self, window, name, filled) -> None:
        self.sums.copy_(_where_begun(filled, window[f"linear.{name}"], self.sums))
        if self.last:
            index = self._order(filled).view(len(filled), 1, 1, self.last, 1).expand_as(self.ring)
            self.ring.copy_(self.ring.scatter(3, index, window[f"tail.{name}"].to(self.ring.dtype)))

    def save(self, name, filled) -> dict[str, Tensor]:
        held = {f"linear.{name}": _where_begun(filled, self.sums)}
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


class NearLayer:
    """Memory slots that are near, the window so far (B, 2, H, n + T, d), and sums over all places that are not."""

    def __init__(self, block: RecurGPT2Block, rows: int, window: int, slots: int, last: int | None, like: Tensor):
        self.block, self.slots, self.last = block, slots, last or 0
        self.near = block.far_gate.near_tokens
        self.kept = max(self.near, self.last)
        heads, width, features = block.attn.num_heads, block.attn.head_dim, block.feature_map.out_features
        self.sums = widen(like).new_zeros(rows, heads, features, width + 1)
        self.places = like.new_zeros(rows, 2, heads, self.kept + window, width)

    @property
    def buffers(self) -> list[Tensor]:
        return [self.sums, self.places]

    def attend(self, hidden: Tensor, places: Places) -> Tensor:
        block = self.block
        projected = block.project_together(hidden)
        query = projected[:, 0]
        places.put(self.places, self.kept, projected[:, 1:, :, 0])
        key, value = self._near_places(places).to(query.dtype).unbind(1)
        query = query * block.query_factor
        features = block.feature_map.features(query, key[:, :, :1])
        scaled = query * block.attn.head_dim**-0.5
        mask = self._mask(places)
        options = {"mask": mask, "floor": block.feature_map.floor}
        out = near_attention(scaled, key, value, *features, block.far_gate(scaled), unpacked(self.sums), **options)
        leaving = absorb(features[1], value[:, :, :1], unpacked(self.sums), mask=mask[:, :1])
        self.sums.copy_(packed(leaving))
        return out

    def last_positions(self, rows: Tensor) -> KeyValue:
        return _last_places(self.places, rows, self.last)[:, None].unbind(2)

    def total(self, rows: Tensor) -> Tensor:
        key, value = _last_places(self.places, rows, self.near).unbind(1)
        return packed(absorb(self.block.feature_map(key), value, unpacked(self.sums[rows])))

    def begin(self, rows: Tensor, memory: KeyValue | None, carried: Tensor | None) -> None:
        self.sums[rows] = 0
        self.places[rows, :, :, : self.kept] = 0
        if memory is not None:
            slots = min(self.kept, self.slots)
            last = torch.stack(memory, dim=1)[..., self.slots - slots :, :]
            self.places[rows, :, :, self.kept - slots : self.kept] = last.to(self.places.dtype)
            early = tuple(each[:, None, :, : -self.near] for each in memory)
            if early[0].shape[3]:
                self.sums[rows] = slot_sums(self.block, early, True)[:, 0]
        if carried is not None:
            self.sums[rows] += carried

    def load(self, window, name, filled) -> None:
        self.sums.copy_(_where_begun(filled, window[f"linear.{name}"], self.sums))
        tail = window[f"tail.{name}"].to(self.places.dtype)
        for row, count in enumerate(filled):
            if count:
                self.places[row, :, :, count : count + self.kept] = tail[row]

    def save(self, name, filled) -> dict[str, Tensor]:
        tail = torch.stack([self.places[row, :, :, count : count + self.kept] for row, count in enumerate(filled)])
        return {f"linear.{name}": _where_begun(filled, self.sums), f"tail.{name}": _where_begun(filled, tail)}

    def _near_places(self, places):
        """(B, 2, H, w + 1, d), the new token's near places behind the one that has just left them."""
        first = self.kept - self.near
        if places.alike:
            return self.places[..., first + places.filled[0] : first + places.filled[0] + self.near + 1, :]
        index = first + places.index[:, None] + torch.arange(self.near + 1, device=places.device)
        shape = *self.places.shape[:3], self.near + 1, self.places.shape[4]
        return self.places.gather(3, index[:, None, None, :, None].expand(shape))

    def _mask(self, places):
        """(B, w + 1) bool, where there is something: memory in front, or a token."""
        index = self.kept - self.near + places.index[:, None] + torch.arange(self.near + 1, device=places.device)
        return index >= self.kept - min(self.kept, self.slots) * places.reads[:, None]


def make_layer(block: RecurGPT2Block, rows: int, window: int, slots: int, last: int | None, like: Tensor):
    """The buffers that a block's attention needs.

    Args:
        slots: M, 0 where the layer reads no memory.
        last: n, last positions that the layer's memory is written from; None if it leaves none.
        like: of the type and device of keys and values.
    """
    kind = SoftmaxLayer if block.feature_map is None else LinearLayer if block.far_gate is None else NearLayer
    return kind(block, rows, window, slots, last, like)


def _last_places(places: Tensor, rows: Tensor, count: int) -> Tensor:
    """(B, 2, H, N, d) -> (R, 2, H, count, d) of some rows."""
    return places[rows, :, :, places.shape[-2] - count :]


def _where_begun(filled: list[int], values: Tensor, instead: Tensor | None = None) -> Tensor:
    """(B, ...) values of rows whose windows have begun; of the others `instead`, or zeros."""
    begun = torch.tensor([n > 0 for n in filled], device=values.device).view(-1, *[1] * (values.ndim - 1))
    return torch.where(begun, values, torch.zeros_like(values) if instead is None else instead.to(values.dtype))
