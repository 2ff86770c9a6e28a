"""RecurCache: what transformers' `generate` carries from token to token.

It holds the buffers of a `Decoder`, and how many positions it has seen. It is changed in place; `RecurCache.state()`
copies a RecurState out of it, to keep, save or branch from. B rows, D model width, V vocabulary, N slots of a pointer
memory, w width of their keys.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache

from ..errors import InputError
from .decoder import Decoder
from .outputs import NEW_CACHE, OLD_CACHE
from .state import RecurState


def given_cache(cache: Cache | None, past_key_values: Cache | None) -> RecurCache | None:
    """The cache that was given, under the new word or the old one.

    An empty one of another kind counts as none: a `generate` that does not ask `_supports_default_dynamic_cache` makes
    one for every model.

    Raises:
        InputError: both were given, or one of another kind that has read something.
    """
    if cache is not None and past_key_values is not None:
        raise InputError(f"{NEW_CACHE} and {OLD_CACHE} are two words for one thing; give one of them")
    cache = past_key_values if cache is None else cache
    if isinstance(cache, Cache) and not isinstance(cache, RecurCache):
        if cache.get_seq_length():
            raise InputError(f"a {type(cache).__name__} is another model's; give what this one returned, or a state")
        return None
    return cache


class RecurCache(Cache):
    """transformers' view of a state that goes on token by token.

    Attributes:
        seen: positions of the batch that were read since the cache was made, pads included.
        held: logits (B, 1, V) behind a token that was read already: the next step gives them and reads nothing.
    """

    def __init__(self, model, state: RecurState, seen: int = 0):
        """
        Args:
            model: the RecurGPT2LMHeadModel that reads on.
            state: where its rows are; copied.
        """
        super().__init__(layers=[])
        self.seen, self._decoder = seen, Decoder(model.transformer, state)
        self.held: Tensor | None = None

    def state(self) -> RecurState:
        """A copy of where the rows are: after all tokens read, which the last one generated is not."""
        return self._decoder.state()

    def step(self, input_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Read one token of each row.

        Args:
            input_ids: (B, 1).

        Returns:
            Hidden states (B, 1, D), and what they may point at, (B, N, w + 1), or None.
        """
        self.seen += 1
        slots = self._decoder.slots
        if slots is not None and self._decoder.fills_a_window:
            slots = slots.clone()  # they are written in place
        return self._decoder.step(input_ids), slots

    def go_on(self, state: RecurState, seen: int) -> None:
        """Take over the state after `seen` more positions."""
        self.seen, self.held = self.seen + seen, None
        if state.batch_size == self.batch_size:
            self._decoder.load(state)
        else:
            self._decoder = Decoder(self._decoder.model, state)

    @property
    def batch_size(self) -> int:
        return len(self._decoder.filled)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers; the same after any number of tokens."""
        return self._decoder.nbytes

    def __len__(self):
        return len(self._decoder.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b goes on as row `beam_idx[b]` was."""
        self._decoder.reorder(beam_idx.cpu())
        self._select_held(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._decoder = Decoder(self._decoder.model, self.state().select(indices.cpu()))
        self._select_held(indices)

    def _select_held(self, rows):
        if self.held is not None:
            self.held = self.held[rows.to(self.held.device)]

    def crop(self, tokens_to_remove: int) -> None:
        raise InputError("tokens that were read cannot be forgotten; keep RecurCache.state() and go on from that")

    def reset(self) -> None:
        """Back to the start of a document, in every row."""
        self.seen, self.held = 0, None
        self._decoder.load(RecurState.empty(self.batch_size))

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return True

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_linear(self) -> list[bool]:
        """False for each layer: transformers 5.24 cuts off what a cache has read already, unless all are linear."""
        return [False] * len(self)

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self)
