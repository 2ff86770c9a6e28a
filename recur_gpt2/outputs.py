"""What the models return."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import Cache
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


@dataclass
class RecurGPT2LMOutput(ModelOutput):
    """Output of RecurGPT2LMHeadModel.

    Attributes:
        loss: () mean cross-entropy in nats over the labels that are scored; only with labels.
        logits: (B, N, V).
        state: to go on from.
        hidden_states: as in RecurGPT2Output.
        past_key_values: what `generate` goes on from, in place of a state; only with `use_cache`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: RecurState | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    past_key_values: Cache | None = None
