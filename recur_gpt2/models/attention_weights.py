"""Attention weights, made beside the attention itself for those who ask for them.

B rows, W windows, H heads, T tokens a window, M memory slots, F positions of the windows so far, d = D / H.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .block import RecurGPT2Block
from .windows import NewWindows


class AttentionWeights:
    """An attention hook that keeps what every layer attends to, for one block of windows."""

    def __init__(self):
        self._layers: dict[str, list[Tensor]] = {}
        self._slots: dict[str, int] = {}

    def __call__(
        self, block: RecurGPT2Block, query: Tensor, key: Tensor, memory: Tensor | None, windows: NewWindows
    ) -> None:
        """(B, W, H, T, d) queries, (B, W, H, F, d) keys, (B, W, H, M, d) keys of memory."""
        visible = torch.arange(key.shape[3]) <= windows.positions(query.shape[3], 0)[..., None]  # (B, W, T, F)
        if memory is not None:
            reads = torch.as_tensor(windows.reads).expand(visible.shape[:2].numel()).view(*visible.shape[:2], 1, 1)
            slots = reads.expand(*visible.shape[:3], memory.shape[3])
            visible, key = torch.cat((slots, visible), dim=3), torch.cat((memory.to(key.dtype), key), dim=3)
        scores = query @ key.transpose(-1, -2) * block.attn.scaling
        scores = scores.masked_fill(~visible[:, :, None].to(scores.device), torch.finfo(scores.dtype).min)
        self._layers.setdefault(block.name, []).append(scores.softmax(dim=-1).to(query.dtype))
        self._slots.setdefault(block.name, 0)
        if memory is not None:
            self._slots[block.name] = memory.shape[3]

    def layers(self) -> list[tuple[Tensor, int]]:
        """For each layer its weights (B, W, H, T, M + F), and M. Windows without memory have zeros for it."""
        joined = []
        for name, parts in self._layers.items():
            most = max(part.shape[-1] for part in parts)
            joined.append(
                (torch.cat([pad(part, (most - part.shape[-1], 0)) for part in parts], dim=1), self._slots[name])
            )
        return joined


def joined_weights(pieces: list[list[tuple[Tensor, int]]]) -> list[list[Tensor]]:
    """Weights of several blocks of windows, layer by layer -> the same of one size, (B, W * T, H * (M + F)) each."""
    joined = []
    for layers in zip(*pieces, strict=True):
        slots = max(slots for _, slots in layers)
        length = max(weights.shape[-1] - own for weights, own in layers)
        sized = [_resized(weights, own, slots, length) for weights, own in layers]
        joined.append([each.transpose(2, 3).flatten(1, 2).flatten(2) for each in sized])
    return [list(piece) for piece in zip(*joined, strict=True)]


def _resized(weights, own, slots, length):
    """Zeros for slots in front that there were none of, and for positions behind."""
    memory, window = weights[..., :own], weights[..., own:]
    return torch.cat((pad(memory, (slots - own, 0)), pad(window, (0, length - window.shape[-1]))), dim=-1)
