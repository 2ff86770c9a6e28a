"""The loss of a segment: what one backward pass of finetuning runs through."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data.batches import Segment
from ..models.modeling import RecurGPT2LMHeadModel
from ..models.schedule import CallLayer
from ..models.state import RecurState
from ..ops.cross_entropy import accumulate_gradients, summed_loss
from ..ops.matmul import weight_of
from .activation_checkpointing import recomputed
from .arguments import TrainingArguments


class SegmentLoss(nn.Module):
    """The summed loss of a segment, and the state after it: what one backward pass runs through."""

    def __init__(self, model: RecurGPT2LMHeadModel, args: TrainingArguments):
        super().__init__()
        self.model, self.args = model, args

    def forward(self, segment: Segment, state: RecurState | None) -> tuple[Tensor, RecurState]:
        starts = segment.starts if self.args.recurrent else torch.ones_like(segment.starts)
        whole = segment.input_ids, segment.targets, starts
        parts = zip(*(tensor.split(self.args.block, dim=1) for tensor in whole), strict=True)
        blocks = [_Block(self.model, *part, sparse=self.args.checkpointing) for part in parts]
        state = RecurState.empty(len(starts)) if state is None else state
        if self.args.checkpointing:
            return recomputed(blocks, state, list(self.model.parameters()))
        outputs = []
        for block in blocks:
            each, state = block.read(state)
            outputs.append(each)
        # One loss for all: each would keep a gradient of its own as large as the head.
        joined = [torch.cat(each, dim=1) for each in zip(*outputs, strict=True)]
        return _Block(self.model, *whole).loss(*joined), state


@dataclass
class _Block:
    """Some windows of each lane. P windows: input_ids and targets (B, P, T), starts (B, P).

    `sparse`: the embedding's gradient names the tokens' rows alone. It must have a dense one to be added to, and
    saves one as large as the vocabulary beside it.
    """

    model: RecurGPT2LMHeadModel
    input_ids: Tensor
    targets: Tensor
    starts: Tensor
    sparse: bool = False

    def read(self, state: RecurState, call_layer: CallLayer | None = None) -> tuple[tuple[Tensor, ...], RecurState]:
        """-> hidden states and, if the head has a mixture, its shares; and the state after."""
        embedding = self.model.get_input_embeddings()
        before, embedding.sparse = embedding.sparse, self.sparse
        try:
            hidden, shares, state = self.model.read_windows(
                self.input_ids, self.targets, self.starts, state, call_layer
            )
        finally:
            embedding.sparse = before
        return (hidden, *(shares or ())), state

    def loss(self, hidden: Tensor, *shares: Tensor) -> Tensor:
        return summed_loss(hidden, weight_of(self.model.lm_head), self.targets, shares or None)

    def loss_backward(self, grad_total: Tensor, hidden: Tensor, *shares: Tensor) -> list[Tensor | None]:
        weight = weight_of(self.model.lm_head)
        # An adapted head's gradient goes on to what it is made of.
        leaf = weight if weight.is_leaf else weight.detach().requires_grad_()
        grad_hidden, grad_shares = accumulate_gradients(hidden, leaf, self.targets, grad_total, shares or None)
        if leaf is not weight:
            weight.backward(leaf.grad)
        return [grad_hidden, *(grad_shares or ())]
