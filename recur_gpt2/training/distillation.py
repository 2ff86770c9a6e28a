"""Attention transfer: before finetuning, teach feature maps the softmax attention that they stand in for.

Zhang et al. 2024 (Hedgehog) and LoLCATs do so for each head. Here too: the model reads with softmax attention in all
layers, and every map learns to give the same weights to the same queries and keys. Nothing else learns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..data.batches import Segment
from ..models.feature_map_fitting import softmax_divergence
from ..models.modeling import RecurGPT2LMHeadModel
from ..models.state import RecurState
from ..ops.softmax import visible_positions

WEIGHTS = 2**22  # attention weights compared at a time: a few tensors of as many numbers are held


class TransferLoss(nn.Module):
    """Divergence of the linear layers' attention from softmax's, for a segment, and the state after it."""

    def __init__(self, model: RecurGPT2LMHeadModel, *, recurrent: bool):
        super().__init__()
        self.model, self.recurrent = model, recurrent

    def forward(self, segment: Segment, state: RecurState | None) -> tuple[Tensor, RecurState]:
        """Nats a query, the mean over layers and heads, times the tokens that the segment scores."""
        starts = segment.starts if self.recurrent else torch.ones_like(segment.starts)
        shown: list[tuple] = []

        def hook(block, query, key, memory, windows):
            if block.feature_map is not None:
                shown.append((block, query, key, memory, windows.reads))

        was_training = self.model.training
        self.model.eval()  # the teacher does not drop anything
        with torch.no_grad():
            state = self.model.transformer.teacher_forward(segment.input_ids, starts, state, hook)
        self.model.train(was_training)
        # Some layers are shown all windows at once, others one after the other.
        windows = segment.starts.numel() * len(self.model.config.linear_layers)
        return torch.stack([_divergence(*seen) for seen in shown]).sum() / windows * segment.scored, state


def _divergence(block, query, key, memory, has_memory) -> Tensor:
    """(B, W, H, T, d) queries and keys, keys of memory (B, W, H, M, d) or None -> (), summed over windows."""
    slots, length = 0, query.shape[3]
    if memory is not None:
        slots = memory.shape[3]
        key = torch.cat((memory.to(key.dtype), key), dim=3)
    query, key = (query * block.query_factor).flatten(0, 1), key.flatten(0, 1)
    has_memory = torch.as_tensor(has_memory).expand(len(query))
    step = max(1, WEIGHTS // (query.shape[1] * length * (slots + length)))
    parts = zip(query.split(step), key.split(step), has_memory.split(step), strict=True)
    each = [checkpoint(_summed, block, *part, slots, use_reentrant=False) for part in parts]
    return torch.stack(each).sum()


def _summed(block, query, key, has_memory, slots):
    visible = visible_positions(query.shape[2], slots, has_memory, query.device)
    with torch.autocast(query.device.type, enabled=False):
        divergence = softmax_divergence(block.feature_map, query, key, visible, far_gate=block.far_gate)
    return divergence * len(query)
