"""How a block of tokens lies in windows: where each token stands, what it may see, what is left afterwards.

`NewWindows` are W windows of each row, computed at once from their first token on; `PartialWindows` continues windows
that are not full. The model runs its layers over either one alike. B rows, W windows, T tokens a window, H heads,
d = D / H. All decisions are made from Python numbers, taken from the state's counters once: none waits for a GPU, and
none breaks the graph of torch.compile at every layer.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import torch
from torch import Tensor

from ..ops.linear import LinearState, linear_attention
from ..ops.softmax import KeyValue, partial_window_attention, window_attention
from .state import RecurState


class NewWindows:
    """W windows of each of B rows, all computed from their first token on.

    Attributes:
        has_memory: (B, W) bool on the CPU, whether each window continues the one before.
        completed: B numbers, windows of each row that end full.
        filled: B numbers, tokens in each row's unfinished window afterwards.
        reads: whether the windows have memory: True, False or, where they differ, (B * W,) bool.
        are_new: whether the windows only begin.
    """

    are_new = True

    def __init__(self, state: RecurState, has_memory: Tensor, tokens: Tensor, window: int):
        """`tokens`: (B,) int64, tokens of each row; whatever lies beyond them is padding."""
        self.state, self.has_memory, self.tokens, self.window = state, has_memory, tokens, window
        counts = tokens.tolist()
        self.completed, self.filled = [n // window for n in counts], [n % window for n in counts]
        self._continues, self._numbers = has_memory.tolist(), torch.arange(has_memory.shape[1])
        self.reads = self._reads()

    @property
    def is_padded(self) -> bool:
        """Whether a window that holds tokens has pads behind them."""
        return self.has_unfinished

    @property
    def has_unfinished(self) -> bool:
        """Whether a row ends in a window that is not full."""
        return any(self.filled)

    def part(self, windows: slice) -> NewWindows:
        """Some of the windows, to run some layers over. What they leave is for all of them to say."""
        part = copy(self)
        part.has_memory, part._numbers = self.has_memory[:, windows], self._numbers[windows]
        part._continues = [row[windows] for row in self._continues]
        part.reads = part._reads()
        return part

    def _reads(self):
        each = [continues for row in self._continues for continues in row]
        return each[0] if _alike(each) else torch.tensor(each)

    def positions(self, length: int, offset: int) -> Tensor:
        """(B, W, T) int64 position ids; a window that has memory is shifted by `offset`."""
        return torch.arange(length) + offset * self.has_memory[..., None].long()

    def pads(self, length: int) -> Tensor:
        """(B, W, T) bool, positions that hold no token."""
        positions = self._numbers[:, None] * length + torch.arange(length)
        return positions >= self.tokens[:, None, None]

    @property
    def read_now(self) -> list[int]:
        """Tokens of each row's unfinished window that are among these."""
        return self.filled

    def with_memory(self, memory: dict[str, Tensor]) -> NewWindows:
        """The same windows behind another memory, in RecurState's terms."""
        windows = copy(self)
        windows.state = replace(self.state, memory=memory)
        return windows

    def extend(self, layer: str, key: Tensor, value: Tensor) -> KeyValue:
        """(B, W, H, T, d) new keys and values -> those of the windows so far: the same."""
        return key, value

    def extend_positions(self, name: str, new: Tensor) -> Tensor:
        """(B, W, T, d) of the new tokens -> (B, W, T, d) of the windows so far: the same."""
        return new

    def windows_before(self, window: int) -> list[int]:
        """Full windows of each row's document before a window of the block; W for the one after it."""
        before = []
        for continues, read in zip(self._continues, self.state.windows.tolist(), strict=True):
            start = self._last_start(continues, window)
            before.append(read + window if start is None else window - start)
        return before

    @staticmethod
    def _last_start(continues, window):
        return next((n for n in reversed(range(min(window + 1, len(continues)))) if not continues[n]), None)

    def attend(self, query, key, value, memory: KeyValue | None, **options) -> Tensor:
        """Softmax attention: (B, W, H, T, d) each, memory (B, W, H, M, d) -> (B, W, H, T, d)."""
        flat = (tensor.flatten(0, 1) for tensor in (query, key, value))
        memory = None if memory is None else tuple(tensor.flatten(0, 1) for tensor in memory)
        return window_attention(*flat, memory, self.reads, **options).view(query.shape)

    def attend_linearly(self, query, key, value, start: LinearState | None, floor: float) -> tuple[Tensor, LinearState]:
        """Linear attention.

        Args:
            query, key: features (B, W, H, T, k).
            value: (B, W, H, T, d).
            start: (S, z) before each window's first token here, (B, W, H, k, d) and (B, W, H, k); None for zeros.
            floor: least denominator.

        Returns:
            (B, W, H, T, d), and (S, z) after each window's tokens.
        """
        mask = ~self.pads(query.shape[3]).flatten(0, 1).to(query.device) if self.is_padded else None
        flat = (tensor.flatten(0, 1) for tensor in (query, key, value))
        start = None if start is None else tuple(tensor.flatten(0, 1) for tensor in start)
        out, state = linear_attention(*flat, start, mask=mask, floor=floor)
        return out.view(value.shape), tuple(tensor.unflatten(0, value.shape[:2]) for tensor in state)

    def sums(self, layer: str) -> Tensor | None:
        """(B, 1, H, k, d + 1) of the windows so far, S with z beside it; None for windows that only begin."""
        return None

    def prefix(
        self, layer: str, memory: KeyValue | None, slots: int, like: Tensor, count: int
    ) -> tuple[Tensor, int | Tensor]:
        """The `count` positions before each window's tokens here: memory slots or earlier tokens, aligned to the end.

        Args:
            memory: keys and values (B, W, H, M, d) of new windows, or None.
            slots: M, of partial windows.
            like: (B, W, H, T, d)

        Returns:
            Keys and values (B, W, 2, H, count, d), and how many of the positions there are: a number, or (B * W,).
        """
        rows, windows, heads, _, width = like.shape
        if memory is None:
            return like.new_zeros(rows, windows, 2, heads, count, width), 0
        slots = min(count, memory[0].shape[3])
        last = torch.stack(memory, dim=2)[..., memory[0].shape[3] - slots :, :].to(like.dtype)
        if self.reads is not True:  # what a row does not see must not be in its state either
            last = last * self.reads.view(rows, windows, 1, 1, 1, 1).to(last.device)
        return torch.nn.functional.pad(last, (0, 0, count - slots, 0)), slots * self.reads

    def last_positions(self, layer: str, key: Tensor, value: Tensor, count: int) -> KeyValue:
        """Keys and values of the last `count` positions of each window, (B, W, H, count, d); of full ones only.

        `key` may hold as little as those positions.
        """
        return key[..., key.shape[-2] - count :, :], value[..., value.shape[-2] - count :, :]

    def tails(self, layer: str, key: Tensor, value: Tensor, count: int) -> Tensor:
        """(B, W, H, T, d) -> (B, W, 2, H, count, d) of unfinished windows, aligned to the end, zero in front."""
        both = torch.stack((key, value), dim=2)
        return ending_at(torch.nn.functional.pad(both, (0, 0, count, 0)), self.filled, count)

    def next_state(self, memory: dict[str, Tensor], window: dict[str, Tensor]) -> RecurState:
        goes_on, read = [], []  # whether the state's document does, and the full windows of the last one in here
        for continues, completed in zip(self._continues, self.completed, strict=True):
            starts = [number for number, has_memory in enumerate(continues) if not has_memory]
            goes_on.append(not starts)
            read.append(max(0, completed - (starts[-1] if starts else 0)))
        # The count itself stays a tensor: torch.compile would take every new number for another function.
        windows = self.state.windows * torch.tensor(goes_on) + torch.tensor(read)
        return RecurState(windows, torch.tensor(self.filled), memory, window)

    def after_completed(self, each: Tensor, before: Tensor | None) -> Tensor:
        """(B, W, ...) raw memory after each window -> (B, ...) after each row's last full window."""
        if min(self.completed) == each.shape[1]:
            return each[:, -1].clone()  # a view would keep the memory of all the windows
        if before is None:
            before = torch.zeros_like(each[:, 0])
        return _pick(torch.cat((before[:, None], each), dim=1), self.completed)

    def unfinished(self, kept: dict[str, tuple[Tensor, ...]]) -> dict[str, Tensor]:
        """What attention layers kept of each window, (B, W, ...), -> RecurState.window."""
        return {
            name: self._unfinished_positions(*each) if len(each) == 2 else self.unfinished_sums(*each)
            for name, each in kept.items()
        }

    def _unfinished_positions(self, key: Tensor, value: Tensor) -> Tensor:
        """(B, W, H, T, d) -> (B, 2, H, F, d) of each row's unfinished window, zero beyond its tokens."""
        return torch.stack([self.unfinished_positions(tensor) for tensor in (key, value)], dim=1)

    def unfinished_positions(self, positions: Tensor) -> Tensor:
        """(B, W, ..., T, d) -> (B, ..., F, d) of each row's unfinished window, zero beyond its tokens."""
        longest = max(self.filled)
        kept = _pick(positions, self._last_begun(positions.shape[1]))[..., :longest, :]
        if _alike(self.filled):
            return kept
        inside = (torch.arange(longest) < torch.tensor(self.filled)[:, None]).to(kept.device)
        return kept * inside.view(len(inside), *[1] * (kept.ndim - 3), longest, 1)

    def unfinished_sums(self, sums: Tensor) -> Tensor:
        """(B, W, ...) -> (B, ...) of each row's unfinished window, zero where there is none."""
        kept = _pick(sums, self._last_begun(sums.shape[1]))
        begun = (torch.tensor(self.filled) > 0).to(kept.device)
        return kept * begun.view(-1, *[1] * (kept.ndim - 1))

    def _last_begun(self, windows):
        return [min(completed, windows - 1) for completed in self.completed]


class PartialWindows(NewWindows):
    """One window of each row, continued: row b's n tokens stand behind the `state.filled[b]` that it holds. W = 1."""

    are_new = False

    @property
    def is_padded(self) -> bool:
        return not _alike(self.new_tokens.tolist())

    def __init__(self, state: RecurState, has_memory: Tensor, tokens: Tensor, window: int):
        super().__init__(state, has_memory, state.filled + tokens, window)
        self.new_tokens, self._filled_before = tokens, state.filled.tolist()

    @property
    def read_now(self) -> list[int]:
        return self.new_tokens.tolist()

    def positions(self, length: int, offset: int) -> Tensor:
        positions = self.state.filled[:, None, None] + super().positions(length, offset)
        # Padding behind a row's tokens may count past the window: keep it inside the position table.
        return positions.clamp_max(self.window - 1 + offset)

    def pads(self, length: int) -> Tensor:
        return (torch.arange(length) >= self.new_tokens[:, None])[:, None]

    def extend(self, layer: str, key: Tensor, value: Tensor) -> KeyValue:
        """Keys and values of each window so far, the new ones behind the old: (B, 1, H, F, d)."""
        old = self.state.window[layer]
        new = torch.stack((key[:, 0], value[:, 0]), dim=1)
        both = self._append(old, new)
        return both[:, None, 0], both[:, None, 1]

    def extend_positions(self, name: str, new: Tensor) -> Tensor:
        """Those of each window so far, the new ones behind the old: (B, 1, F, d)."""
        return self._append(self.state.window[name], new[:, 0])[:, None]

    def sums(self, layer: str) -> Tensor | None:
        return self.state.window[f"linear.{layer}"][:, None]

    def prefix(self, layer, memory, slots, like, count):
        return self.state.window[f"tail.{layer}"][:, None], self.state.filled + slots * self.reads

    def last_positions(self, layer: str, key: Tensor, value: Tensor, count: int) -> KeyValue:
        return self.tails(layer, key, value, count).unbind(2)

    def tails(self, layer: str, key: Tensor, value: Tensor, count: int) -> Tensor:
        old, new = self.state.window[f"tail.{layer}"][:, None], torch.stack((key, value), dim=2)
        both = torch.cat((old[..., old.shape[-2] - count :, :], new.to(old.dtype)), dim=-2)
        return ending_at(both, self.read_now, count)

    def _append(self, old, new):
        """(B, ..., F, d) and (B, ..., n, d) -> (B, ..., F', d), row b's new ones at `filled[b]`."""
        filled = self._filled_before
        if _alike(filled):
            return torch.cat((old[..., : filled[0], :], new.to(old.dtype)), dim=-2)
        length = int((self.state.filled + self.new_tokens).max())
        room = max(length, max(filled) + new.shape[-2])
        both = old.new_zeros(*old.shape[:-2], room, old.shape[-1])
        both[..., : old.shape[-2], :] = old
        positions = (self.state.filled[:, None] + torch.arange(new.shape[-2])).to(old.device)
        index = positions.view(len(filled), *[1] * (new.ndim - 3), -1, 1).expand_as(new)
        return both.scatter(-2, index, new.to(old.dtype))[..., :length, :]

    def attend(self, query, key, value, memory: KeyValue | None, **options) -> Tensor:
        memory = None if memory is None else tuple(tensor[:, 0] for tensor in memory)
        parts = query[:, 0], key[:, 0], value[:, 0]
        return partial_window_attention(*parts, memory, self.reads, self._filled_before, **options)[:, None]


def ending_at(tensor: Tensor, ends: list[int], count: int) -> Tensor:
    """(B, ..., count + n, d) -> (B, ..., count, d): row b's positions from `ends[b]` on."""
    if _alike(ends):
        return tensor[..., ends[0] : ends[0] + count, :].clone()  # a view would keep what lies around it
    positions = (torch.tensor(ends)[:, None] + torch.arange(count)).to(tensor.device)
    index = positions.view(len(ends), *[1] * (tensor.ndim - 3), count, 1)
    return tensor.gather(-2, index.expand(*tensor.shape[:-2], count, tensor.shape[-1]))


def _alike(numbers):
    return len(set(numbers)) == 1


def _pick(tensor, index):
    """tensor[b, index[b]] for every row b; a plain slice where all rows agree."""
    if _alike(index):
        return tensor[:, index[0]]
    return tensor[torch.arange(len(index), device=tensor.device), torch.tensor(index, device=tensor.device)]
