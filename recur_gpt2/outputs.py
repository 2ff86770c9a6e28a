"""What the transformer returns; what the model with a head does is in generation.py, where its cache is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

from .state import RecurState


@dataclass
class RecurGPT2Output(ModelOutput):
    """Output of RecurGPT2Model.

    Attributes:
        last_hidden_state: (B, N, D), zero at padding.
        state: to go on from.
        hidden_states: with `output_hidden_states`, L + 1 tensors (B, N, D): the embeddings, then each layer's output,
            the last one after the final layer norm.
    """

    last_hidden_state: Tensor | None = None
    state: RecurState | None = None
    hidden_states: tuple[Tensor, ...] | None = None
