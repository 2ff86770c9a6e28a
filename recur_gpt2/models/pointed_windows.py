"""What the windows of a block may point at, and what they leave for later ones.

B rows, W windows, T tokens a window, w width of keys, N slots. Slots and positions are (w + 1,), as in pointer.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pointer import POINTER, PointerMemory
from .windows import NewWindows


class PointedWindows:
    """What a block of windows may point at, and what it leaves."""

    def __init__(self, memory: PointerMemory, windows: NewWindows, positions: Tensor):
        """`positions`: (B, W, T', w + 1) of the tokens read."""
        self._memory, self._windows = memory, windows
        self._each = windows.window - 1  # slots that a window leaves: its last token's successor is not known
        self._held = windows.extend_positions(POINTER, positions)
        before = windows.state.memory.get(POINTER)
        self._slots = memory.empty(positions) if before is None else before
        if any(windows.completed):
            self._slots = torch.cat((self._slots, memory.pairs(self._held).flatten(1, 2)), dim=1)

    def seen(self, window: int) -> Tensor | None:
        """(B, S, w + 1), what each row's window number so and so of the block may point at; None for nothing."""
        size = min(self._memory.slots, max(self._windows.windows_before(window)) * self._each)
        return self._last(window, size) if size else None

    def leave(self, memory: dict[str, Tensor], window: dict[str, Tensor]) -> None:
        """Put in RecurState's terms what is there after the block."""
        windows = self._windows
        if any(windows.completed):
            after = {number: self._last(number, self._memory.slots) for number in set(windows.completed)}
            left = [after[number][row] for row, number in enumerate(windows.completed)]
            memory[POINTER] = torch.stack(left)  # no view, which would keep the slots of all the windows
        elif POINTER in windows.state.memory:
            memory[POINTER] = windows.state.memory[POINTER]
        if windows.has_unfinished:
            window[POINTER] = windows.unfinished_positions(self._held)

    def _last(self, window, size):
        """The last `size` slots before a window of each row, without those of an earlier document."""
        end = self._memory.slots + window * self._each
        slots = self._slots[:, end - size : end]
        own = torch.tensor(self._windows.windows_before(window)) * self._each
        if bool((own >= size).all()):
            return slots
        return slots * (torch.arange(size) >= size - own[:, None]).to(slots.device)[..., None]
