"""What the models return. B rows, N positions, D model width, L layers, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor
from transformers import Cache
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils import ModelOutput

from .state import RecurState

# In transformers 5.24 `past_key_values` became `cache`, in outputs, arguments and `generate`: CACHE is the word of the
# version at hand, and both are taken as arguments.
OLD_CACHE, NEW_CACHE = "past_key_values", "cache"
CACHE = NEW_CACHE if NEW_CACHE in {field.name for field in fields(GenerateDecoderOnlyOutput)} else OLD_CACHE


@dataclass
class RecurGPT2Output(ModelOutput):
    """Output of RecurGPT2Model.

    Attributes:
        last_hidden_state: (B, N, D), zero at padding.
        state: to go on from.
        hidden_states: with `output_hidden_states`, L + 1 tensors (B, N, D): the embeddings, then each layer's output,
            the last one after the final layer norm.
        attentions: with `output_attentions`, L tensors (B, H, N, M + F): what each position attends to, the layer's
            memory slots first, then the positions of its own window, F of them in the fullest window that was read. M
            is 0 where no window that was read has memory, so that a text within one window gives what GPT-2 gives.
        cache: None, for those who ask GPT-2's output for it; the state is in its place.
    """

    last_hidden_state: Tensor | None = None
    state: RecurState | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    if CACHE == NEW_CACHE:
        cache: Cache | None = None
    else:
        past_key_values: Cache | None = None


@dataclass
class RecurGPT2ClassifierOutput(ModelOutput):
    """Output of RecurGPT2ForSequenceClassification and RecurGPT2ForTokenClassification.

    Attributes:
        loss: (), only with labels.
        logits: (B, classes) of documents, or (B, N, classes) of their tokens.
        state, hidden_states, attentions: as in RecurGPT2Output.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: RecurState | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class RecurGPT2LMOutput(RecurGPT2ClassifierOutput):
    """Output of RecurGPT2LMHeadModel.

    Attributes:
        loss: () mean cross-entropy in nats over the labels that are scored; only with labels.
        logits: (B, N, V).
        state, hidden_states, attentions: as in RecurGPT2Output.
        cache: what `generate` goes on from, in place of a state; only with `use_cache`. Before transformers 5.24 it is
            called `past_key_values`, as in its own outputs.
    """

    if CACHE == NEW_CACHE:
        cache: Cache | None = None
    else:
        past_key_values: Cache | None = None
