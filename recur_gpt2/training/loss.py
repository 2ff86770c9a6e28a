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
        hidden = []
        for block in blocks:
            each, state = block.read(state)
            hidden.append(each)
        # One loss for all: each would keep a gradient of its own as large as the head.
        return _Block(self.model, *whole).loss(torch.cat(hidden, dim=1)), state


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

    def read(self, state: RecurState, call_layer: CallLayer | None = None) -> tuple[Tensor, RecurState]:
        embedding = self.model.get_input_embeddings()
        before, embedding.sparse = embedding.sparse, self.sparse
        try:
            return self.model.transformer.forward_windows(self.input_ids, self.starts, state, call_layer)
        finally:
            embedding.sparse = before

    def loss(self, hidden: Tensor) -> Tensor:
        return summed_loss(hidden, weight_of(self.model.lm_head), self.targets)

    def loss_backward(self, hidden: Tensor, grad_total: Tensor) -> Tensor | None:
        weight = weight_of(self.model.lm_head)
        if weight.is_leaf:
            return accumulate_gradients(hidden, weight, self.targets, grad_total)
        leaf = weight.detach().requires_grad_()  # of an adapted head, whose gradient goes on to what it is made of
        grad_hidden = accumulate_gradients(hidden, leaf, self.targets, grad_total)
        weight.backward(leaf.grad)
        return grad_hidden
