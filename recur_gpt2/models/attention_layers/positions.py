"""Where rows that are decoded token by token stand, and writing into their buffers there.

B rows, N positions, d = D / H.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Positions:
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
            position = self.filled[0] if modulus is None else self.filled[0] % modulus
            buffer[..., first + position, :] = values
        else:
            position = self.index if modulus is None else self.index % modulus
            buffer.movedim(-2, 1)[self.rows, first + position] = values.to(buffer.dtype)


def last_of(positions: Tensor, rows: Tensor, count: int) -> Tensor:
    """(B, 2, H, N, d) -> (R, 2, H, count, d), the last ones of some rows."""
    return positions[rows, :, :, positions.shape[-2] - count :]


def where_begun(filled: list[int], values: Tensor, instead: Tensor | None = None) -> Tensor:
    """(B, ...) values of rows whose windows have begun; of the others `instead`, or zeros."""
    begun = torch.tensor([n > 0 for n in filled], device=values.device).view(-1, *[1] * (values.ndim - 1))
    return torch.where(begun, values, torch.zeros_like(values) if instead is None else instead.to(values.dtype))
