"""Memory of the document at the model's head: keys of its last N positions, each with the token that came next.

A continuous cache (Grave et al. 2017) read by a pointer sentinel mixture (Merity et al. 2017), with learned queries and
keys. Keys come from the last layer and are read behind it, so that windows need not wait for each other. A window
points at the positions of the windows before it, never at its own: a first window is predicted as GPT-2 does.

B rows, W windows, T tokens a window, D model width, w width of keys, N slots, V vocabulary. A slot is (w + 1,), as in
ops/pointer.py. Inside an unfinished window a position is (w + 1,), too: its key, and beside it its own token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor, nn

from ..ops.cross_entropy import Shares
from ..ops.pointer import pointer_logits, pointer_shares
from ..utils.tensors import IGNORE_INDEX, in_full, widen
from .configuration import RecurGPT2Config

POINTER = "pointer"  # its name in RecurState
SCALE = 12.0  # of a new model's scores
ABOVE = 5.0  # the sentinel's score over the largest one that a slot can have: a new model's own share is nearly all


@dataclass(frozen=True)
class Pointed:
    """What some positions may point at.

    Attributes:
        slots: (R, S, w + 1).
        positions: (R, n) int64, which of the positions read, all rows counted through; -1 for padding.
    """

    slots: Tensor
    positions: Tensor


class PointerMemory(nn.Module):
    """Learned queries, keys and sentinel, all of the outputs of the final layer norm."""

    def __init__(self, config: RecurGPT2Config):
        super().__init__()
        self.slots, self.width = config.pointer_slots, config.pointer_width
        self.query = nn.Parameter(torch.empty(self.width, config.n_embd))
        self.key = nn.Parameter(torch.empty(self.width, config.n_embd))
        self.sentinel = nn.Parameter(torch.empty(config.n_embd))
        self.log_scale = nn.Parameter(torch.empty(self.width))
        # Its mean counts. One number alone would misalign, by four bytes, all weights behind it in a file.
        self.above = nn.Parameter(torch.empty(self.width))

    def reset_parameters(self):
        """Begin with a cosine of hidden states, looked at from a few directions."""
        nn.init.orthogonal_(self.key)
        with torch.no_grad():
            self.query.copy_(self.key)
        nn.init.zeros_(self.sentinel)
        nn.init.constant_(self.log_scale, log(SCALE))
        nn.init.constant_(self.above, ABOVE)

    def positions(self, hidden: Tensor, ids: Tensor | None) -> Tensor:
        """(..., D) and (...) token ids, None where only embeddings are known -> (..., w + 1), never in 16 bit."""
        key = _unit(hidden, self.key)
        token = key.new_zeros(key.shape[:-1]) if ids is None else ids.to(key.dtype) + 1
        return torch.cat((key, token[..., None]), dim=-1)

    def empty(self, positions: Tensor) -> Tensor:
        """(B, ..., w + 1) -> (B, N, w + 1), the slots of rows that have read nothing."""
        return positions.new_zeros(len(positions), self.slots, self.width + 1)

    @staticmethod
    def pairs(positions: Tensor) -> Tensor:
        """(..., T, w + 1) of a window -> slots (..., T - 1, w + 1): each key with the next token."""
        return torch.cat((positions[..., :-1, :-1], positions[..., 1:, -1:]), dim=-1)

    def written(self, before: Tensor, positions: Tensor) -> Tensor:
        """Slots (B, N, w + 1) before a full window, and its (B, T, w + 1) -> slots behind it."""
        return torch.cat((before, self.pairs(positions)), dim=1)[:, -self.slots :]

    def shares(self, hidden: Tensor, targets: Tensor, pointed: Sequence[Pointed]) -> Shares:
        """Of the mixture at each position.

        Args:
            hidden: (..., D), outputs of the final layer norm.
            targets: (...) int64.
            pointed: what the positions, flattened, may point at; where there is nothing the model has all.
        """
        flat, wanted = hidden.flatten(0, -2), targets.flatten()
        shares = [widen(flat).new_zeros(len(flat)) for _ in range(2)]
        query, sentinel, ceiling = self._asked(flat) if pointed else (None,) * 3
        for each in pointed:
            positions = each.positions.to(flat.device)
            inside, index = positions >= 0, positions.clamp_min(0)
            asked = wanted[index].where(inside, IGNORE_INDEX)
            found = pointer_shares(query[index], sentinel[index], each.slots, asked, ceiling)
            pairs = zip(shares, found, strict=True)
            shares = [share.index_copy(0, positions[inside], part[inside]) for share, part in pairs]
        return tuple(share.view(targets.shape) for share in shares)

    def logits(self, logits: Tensor, hidden: Tensor, slots: Tensor) -> Tensor:
        """The model's logits (R, n, V) at hidden states (R, n, D) -> those of the mixture with slots (R, S, w + 1)."""
        query, sentinel, ceiling = self._asked(hidden)
        return pointer_logits(logits, query, sentinel, slots, ceiling.detach())

    def weights(self, hidden: Tensor, slots: Tensor) -> Tensor:
        """(R, n, D), (R, S, w + 1) -> the model's share and, behind it, each slot's, (R, n, 1 + S)."""
        query, sentinel, _ = self._asked(hidden)
        scores = torch.cat((sentinel[..., None], query @ slots[..., :-1].mT), dim=-1)
        empty = nn.functional.pad(slots[..., -1] == 0, (1, 0))
        return scores.masked_fill(empty[:, None], -torch.inf).softmax(dim=-1)

    def _asked(self, hidden):
        """(..., D) -> queries (..., w), the sentinel's scores (...), and () what no score exceeds."""
        with in_full(hidden.device):
            scale = widen(self.log_scale).exp()
            ceiling = scale.max()  # queries and keys are of length 1
            sentinel = widen(hidden) @ widen(self.sentinel) + ceiling + widen(self.above).mean()
        return scale * _unit(hidden, self.query), sentinel, ceiling


def pointed_logits(
    memory: PointerMemory, logits: Tensor, hidden: Tensor, sources: Tensor, pointed: Sequence[Pointed]
) -> Tensor:
    """The model's logits (K, V) at some positions -> those of the mixture.

    Args:
        hidden: (K, D).
        sources: (K,) int64, which positions they are, in the terms of `pointed`.
        pointed: what all positions read may point at.
    """
    rows = [(each.slots[row], own) for each in pointed for row, own in enumerate(each.positions)]
    if not rows or not len(sources):
        return logits
    number = torch.full((1 + max(int(sources.max()), *(int(own.max()) for _, own in rows)),), -1)
    for index, (_, own) in enumerate(rows):
        number[own[own >= 0]] = index
    found = number[sources.cpu()]
    changed, places = [], []
    for index in found[found >= 0].unique().tolist():
        place = (found == index).nonzero().squeeze(1).to(logits.device)
        places.append(place)
        changed.append(memory.logits(logits[None, place], hidden[None, place], rows[index][0][None])[0])
    return logits.index_copy(0, torch.cat(places), torch.cat(changed)) if places else logits


def _unit(hidden, weight):
    """(..., D) -> (..., w) of length 1, never in 16 bit."""
    with in_full(hidden.device):
        return nn.functional.normalize(widen(hidden) @ widen(weight).T, dim=-1)
