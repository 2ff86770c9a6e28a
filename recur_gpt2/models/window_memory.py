"""What the windows of one layer attend to beside their own tokens, and what they leave: one interface, two sources.

B rows, W windows, H heads, M slots, n last positions, d = D / H.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ..ops.softmax import KeyValue
from .memory import LayerMemory
from .windows import NewWindows


class WindowMemory(Protocol):
    """As attention sees it.

    Attributes:
        slots: M.
        is_written: whether the layer writes memory from its own keys and values.
        last_positions: n, positions at a window's end that it is written from.
        carried: sums of linear attention that the window before the first one left, or None.
    """

    slots: int
    is_written: bool
    last_positions: int
    carried: Tensor | None

    def write(self, keys_and_values: Callable[[], KeyValue]) -> None:
        """Leave what each window leaves, from the keys and values of its last positions, asked for if needed."""

    def read(self, like: Tensor) -> KeyValue | None:
        """Keys and values (B, W, H, M, d) that each window attends to; None for none. To be called after `write`."""

    def carry(self, sums: Callable[[], Tensor]) -> None:
        """Leave the sums of linear attention (B, W, ...), if they are carried."""


class OwnMemory:
    """Memory that a layer makes from its own keys and values in the window before."""

    def __init__(
        self, windows: NewWindows, module: LayerMemory | None, name: str, left: dict[str, Tensor], carries: bool
    ):
        """
        Args:
            module: the layer's recurrence, or None where it has none.
            name: of the layer, in RecurState.memory.
            left: where to put what the last full windows leave, in RecurState's terms.
            carries: whether sums of linear attention are carried.
        """
        self._windows, self._module, self._name, self._left, self._carries = windows, module, name, left, carries
        self.is_written, self.slots, self.last_positions = module is not None, 0, 0
        if module is not None:
            self.slots = module.slots
            self.last_positions = module.last_positions(windows.window)
        self.carried = windows.state.memory.get(f"linear.{name}")

    def write(self, keys_and_values: Callable[[], KeyValue]) -> None:
        if self._module is None:
            return
        before = self._windows.state.memory.get(self._name)
        has_memory = self._windows.has_memory
        self._written = leave(
            self._left, self._name, self._windows, lambda: self._module.write(*keys_and_values(), before, has_memory)
        )

    def read(self, like: Tensor) -> KeyValue | None:
        if self._module is None or self._windows.reads is False:
            return None
        before = self._windows.state.memory.get(self._name)
        first = self._module.empty(len(like), like=like) if before is None else before
        raw = first[:, None]
        if like.shape[1] > 1:
            raw = torch.cat((raw.to(like.dtype), self._written[:, :-1]), dim=1)
        return self._module.read(raw)

    def carry(self, sums: Callable[[], Tensor]) -> None:
        if self._carries:
            leave(self._left, f"linear.{self._name}", self._windows, sums)


class GivenMemory:
    """Memory that was made elsewhere: the projected embeddings of Yoshida et al. 2020, or none."""

    is_written, last_positions, carried = False, 0, None

    def __init__(self, key_value: KeyValue | None, slots: int):
        self._key_value, self.slots = key_value, slots

    def write(self, keys_and_values: Callable[[], KeyValue]) -> None:
        """Nothing: what these windows leave is pooled from their outputs."""

    def read(self, like: Tensor) -> KeyValue | None:
        return self._key_value

    def carry(self, sums: Callable[[], Tensor]) -> None:
        """Nothing: configurations that carry sums have no pooled memory."""


def leave(left: dict[str, Tensor], name: str, windows: NewWindows, make: Callable[[], Tensor]) -> Tensor | None:
    """Keep what `make` gives for each window, (B, W, ...), of the last full one; what was there, if none is full.

    Returns:
        What `make` gave; None where no window is full.
    """
    before, each = windows.state.memory.get(name), None
    if any(windows.completed):
        each = make()
        left[name] = windows.after_completed(each, before)
    elif before is not None:
        left[name] = before
    return each
