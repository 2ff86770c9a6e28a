"""Padding squeezed out and put back: inside the model a row's tokens stand together, from the first place on."""

from collections.abc import Iterable

import torch
from torch import Tensor

Piece = tuple[Tensor, Tensor, Tensor, list[Tensor]]


def has_padding(attention_mask: Tensor | None) -> bool:
    """Whether a mask (B, N) says that some position holds no token."""
    return attention_mask is not None and not bool((attention_mask != 0).all())


class Packing:
    """Where the tokens of a padded batch are. B rows, N positions a row, of which `lengths[b]` hold a token.

    Attributes:
        tokens: (B, N), or (B, N, D) of embeddings, the batch with every row's tokens in front.
        lengths: (B,) int64 on the CPU.
    """

    def __init__(self, tokens: Tensor, attention_mask: Tensor | None):
        """`tokens`: (B, N) or (B, N, D). `attention_mask`: (B, N), 0 for padding; None for none."""
        rows, positions = tokens.shape[:2]
        self.lengths = torch.full((rows,), positions, dtype=torch.int64)
        self._order = None
        if has_padding(attention_mask):
            self.lengths = (attention_mask != 0).sum(dim=1).cpu()
            # A stable sort keeps the tokens' order, and padding may have stood anywhere.
            self._order = (attention_mask == 0).to(torch.uint8).argsort(dim=1, stable=True)
        self.tokens = self.pack(tokens)

    def pack(self, values: Tensor) -> Tensor:
        """(B, N, ...) as given -> the same with every row's tokens in front."""
        return values if self._order is None else values.gather(1, self._index(values))

    def unpacked(self, values: Tensor) -> Tensor:
        """(B, N) with every row's tokens in front -> as given: what `pack` was given, of its like."""
        return values if self._order is None else torch.empty_like(values).scatter(1, self._order, values)

    def take(self, rows: Tensor, starts: Tensor, count: int) -> Tensor:
        """(R, count, ...) tokens of `rows` (R,) from `starts` (R,) on; zeros beyond a row's end."""
        positions = starts[:, None] + torch.arange(count)
        inside = positions < self.lengths[rows, None]
        device = self.tokens.device
        rows, positions = rows.to(device), positions.clamp_max(self.tokens.shape[1] - 1).to(device)
        taken = self.tokens[rows[:, None], positions]
        return taken * inside.to(device).view(*inside.shape, *[1] * (taken.ndim - 2))

    def places(self, rows: Tensor, starts: Tensor, ends: Tensor, count: int) -> Tensor:
        """(R, count) int64 on the CPU, where the tokens of `rows` (R,) from `starts` (R,) on stand in the batch as it
        was given, all rows counted through; -1 from `ends` (R,) on."""
        positions = starts[:, None] + torch.arange(count)
        inside, row, length = positions < ends[:, None], rows[:, None], self.tokens.shape[1]
        positions = positions.clamp_max(length - 1)
        column = positions if self._order is None else self._order.cpu()[row, positions]
        return torch.where(inside, row * length + column, -1)

    def unpack(self, pieces: Iterable[Piece]) -> list[Tensor]:
        """Put what was computed back where the tokens stood.

        Args:
            pieces: (rows (R,), first positions (R,), token counts (R,), tensors (R, n, D), one a layer), in any order.

        Returns:
            One (B, N, D) a layer, zero at padding.
        """
        pieces = list(pieces)
        if self._order is None and self._whole(pieces):
            packed = [torch.cat(parts, dim=1) for parts in zip(*(tensors for *_, tensors in pieces), strict=True)]
        else:
            packed = [self._scatter(pieces, layer) for layer in range(len(pieces[0][3]))]
        return [self.spread(values) for values in packed]

    def spread(self, values: Tensor) -> Tensor:
        """(B, N, ...) with every row's tokens in front -> where they stood, zero at padding."""
        return values if self._order is None else torch.zeros_like(values).scatter(1, self._index(values), values)

    def _whole(self, pieces):
        """Whether the pieces are all rows, one block after another, with no padding in them."""
        rows = len(self.lengths)
        return all(
            len(piece_rows) == rows and bool((counts == tensors[0].shape[1]).all())
            for piece_rows, _, counts, tensors in pieces
        )

    def _scatter(self, pieces, layer):
        rows, positions = self.tokens.shape[:2]
        like = pieces[0][3][layer]
        flat = like.new_zeros(rows * positions, like.shape[-1])
        for piece_rows, starts, counts, tensors in pieces:
            values = tensors[layer]
            offsets = torch.arange(values.shape[1])
            inside = offsets < counts[:, None]
            target = (piece_rows[:, None] * positions + starts[:, None] + offsets)[inside]
            flat = flat.index_copy(0, target.to(flat.device), values[inside.to(values.device)].to(flat.dtype))
        return flat.view(rows, positions, -1)

    def _index(self, values):
        order = self._order
        return order.view(*order.shape, *[1] * (values.ndim - 2)).expand_as(values)
