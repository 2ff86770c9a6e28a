"""What `forward` is given, checked, and turned into tokens that stand together. B rows, N positions, D model width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import InputError
from .packing import Packing


def packed_inputs(
    embedding: nn.Embedding,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    token_type_ids: Tensor | None,
    attention_mask: Tensor | None,
) -> Packing:
    """Token ids (B, N), or embeddings (B, N, D) where these were given or types are to be added, without padding.

    Raises:
        InputError: both or neither of ids and embeddings, or one of wrong shape.
    """
    tokens, name = _given(input_ids, inputs_embeds)
    if tokens.ndim != (2 if inputs_embeds is None else 3) or not tokens.shape[:2].numel():
        form = "(batch, tokens)" if inputs_embeds is None else "(batch, tokens, width)"
        raise InputError(f"{name} of shape {tuple(tokens.shape)} hold no tokens; give {form}")
    if inputs_embeds is not None and tokens.shape[2] != embedding.weight.shape[1]:
        raise InputError(f"inputs_embeds are {tokens.shape[2]} wide; give {embedding.weight.shape[1]}, as the model is")
    if token_type_ids is not None:
        if token_type_ids.shape != tokens.shape[:2]:
            raise InputError(f"token_type_ids {_shapes(token_type_ids, name, tokens)}")
        tokens = (embedding(tokens) if inputs_embeds is None else tokens) + embedding(token_type_ids)
    if attention_mask is not None:
        _check_mask(attention_mask, name, tokens)
    packing = Packing(tokens, attention_mask)
    if not bool(packing.lengths.any()):
        raise InputError("attention_mask is 0 everywhere; give at least one token")
    return packing


def check_positions(position_ids: Tensor, attention_mask: Tensor | None, shape: tuple[int, int], goes_on: bool) -> None:
    """Refuse positions that are not the tokens' own, since a token's position is that in its window.

    Taken are 0 to N - 1, whatever is padding, and the same counted over tokens alone, as `attention_mask` has them;
    from any number on where a state `goes_on`.

    Args:
        position_ids: (B, N), (1, N) or (N,).
        shape: (B, N).
    """
    if position_ids.ndim > 2 or position_ids.shape[-1] != shape[1]:
        raise InputError(f"position_ids have shape {tuple(position_ids.shape)}; give {tuple(shape)}, or leave them out")
    positions = position_ids.expand(shape)
    own = torch.arange(shape[1], device=positions.device).expand(shape)
    if attention_mask is None:
        tokens, counted = torch.ones_like(own, dtype=torch.bool), own
    else:
        tokens = attention_mask.to(positions.device) != 0
        counted = (tokens.long().cumsum(dim=1) - 1).clamp_min(0)
    for expected in (own, counted):
        first = (positions - expected).masked_fill(~tokens, 0)
        start = first.amax(dim=1, keepdim=True) if goes_on else 0
        if bool((((first == start) | ~tokens).all(dim=1)).all()):
            return
    raise InputError(
        "position_ids are not 0 to n - 1 in every row: a token's position is that in its window; leave them out"
    )


# What collators and trainers that join documents in one row give beside position ids: the same, for other kernels.
FLATTENED = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


def joined_positions(position_ids: Tensor | None, flattened: dict[str, Tensor | int]) -> Tensor | None:
    """The position ids, made from the borders of documents (`cu_seq_lens_q`, (R + 1,)) where they are left out.

    Raises:
        TypeError: `flattened` holds an argument that is none of FLATTENED.
    """
    for name in flattened.keys() - FLATTENED:
        raise TypeError(f"forward() got an unexpected keyword argument {name!r}")
    borders = flattened.get("cu_seq_lens_q")
    if position_ids is None and borders is not None:
        return torch.cat([torch.arange(length) for length in borders.diff().tolist()])[None].to(borders.device)
    return position_ids


class JoinedDocuments:
    """Several documents in one row, as collators without padding make them: position ids begin at 0 at each.

    R documents, L tokens in the longest, N in all.

    Attributes:
        mask: (R, L) int64, 1 for a token.
    """

    def __init__(self, position_ids: Tensor):
        starts = [*(position_ids.flatten() == 0).nonzero().flatten().tolist(), position_ids.numel()]
        lengths = torch.tensor(starts, device=position_ids.device).diff()
        offsets = torch.arange(int(lengths.max()), device=position_ids.device)
        self.mask = (offsets < lengths[:, None]).long()
        self._index = (lengths.cumsum(0) - lengths)[:, None] + offsets * self.mask

    @classmethod
    def found(cls, position_ids: Tensor, attention_mask: Tensor | None, rows: int) -> JoinedDocuments | None:
        """If that is what the positions of a single row say."""
        if rows > 1 or attention_mask is not None or position_ids.shape[:-1].numel() > 1:
            return None
        flat = position_ids.flatten()
        if int(flat[0]) or not bool(((flat[1:] == flat[:-1] + 1) | (flat[1:] == 0)).all()):
            return None
        return cls(flat) if int((flat == 0).sum()) > 1 else None

    def rows(self, joined: Tensor | None) -> Tensor | None:
        """(1, N, ...) -> (R, L, ...)"""
        return None if joined is None else joined[0][self._index]

    def joined_positions(self, positions: Tensor) -> Tensor:
        """Positions among those of the rows, all counted through, -> those in the joined row; -1 stays."""
        return self._index.flatten().to(positions.device)[positions.clamp_min(0)].where(positions >= 0, -1)

    def joined(self, rows: Tensor) -> Tensor:
        """(R, L, ...) -> (1, N, ...)"""
        return rows[self.mask.bool()][None]


def check_labels(labels: Tensor | None, shape: torch.Size, name: str) -> None:
    """Refuse labels that are not of the input's shape (B, N)."""
    if labels is not None and labels.shape != shape:
        raise InputError(f"labels have shape {tuple(labels.shape)}; give that of {name}, {tuple(shape)}")


def refuse_cross_attention(**given: Tensor | None) -> None:
    """Windows attend to memory, and to no other model's hidden states."""
    for name, tensor in given.items():
        if tensor is not None:
            raise InputError(f"{name} cannot be read: there is no cross-attention in windows; leave it out")


def shape_of(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[torch.Size, str]:
    """(B, N), and the name of what has it."""
    tokens, name = _given(input_ids, inputs_embeds)
    return tokens.shape[:2], name


def _given(input_ids, inputs_embeds):
    if (input_ids is None) == (inputs_embeds is None):
        raise InputError("give either input_ids or inputs_embeds, and not both")
    return (input_ids, "input_ids") if inputs_embeds is None else (inputs_embeds, "inputs_embeds")


def _check_mask(mask, name, tokens):
    if mask.shape != tokens.shape[:2]:
        raise InputError(f"attention_mask {_shapes(mask, name, tokens)}")
    if mask.is_floating_point() and not bool(((mask == 0) | (mask == 1)).all()):
        raise InputError("attention_mask holds other numbers than 0, padding, and 1, a token; give those")


def _shapes(tensor, name, tokens):
    return f"has shape {tuple(tensor.shape)}; give that of {name}, {tuple(tokens.shape[:2])}"
