"""transformers' `generate()` on our models, for text of any length at constant memory; and reading on from a state.

What `generate` carries from token to token is a `RecurCache`: the buffers of a `Decoder`, and how many positions it has
seen. It is changed in place; `RecurCache.state()` copies a RecurState out of it, to keep, save or branch from. Not for
what a token does inside the model: decoder.py and modeling.py.

All that touches transformers' `generate` and `Cache` stands here. It was run with transformers 5.17.0, 5.18.0, 5.19.0,
5.20.2, 5.21.1, 5.22.2, 5.23.0 and 5.24.0. In 5.24 `past_key_values` became `cache`, in outputs, arguments and
`generate`: CACHE is the word of the version at hand, and both are taken as arguments.

B rows, N positions, T tokens a window, D model width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import Cache, GenerationMixin, PreTrainedTokenizerBase
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils import ModelOutput

from ..errors import InputError
from .decoder import Decoder
from .hub import load_tokenizer
from .state import RecurState

OLD_CACHE, NEW_CACHE = "past_key_values", "cache"
CACHE = NEW_CACHE if NEW_CACHE in {field.name for field in fields(GenerateDecoderOnlyOutput)} else OLD_CACHE
PARALLEL_WINDOWS = 4  # of a prompt, read at once
NOT_POSSIBLE = {
    "inputs_embeds": "windows are read from tokens; give input_ids",
    "assistant_model": "tokens that are not kept would have to be forgotten again; leave it out",
    "prompt_lookup_num_tokens": "tokens that are not kept would have to be forgotten again; leave it out",
    "assistant_early_exit": "tokens that are not kept would have to be forgotten again; leave it out",
    "output_attentions": "attention weights are never built; leave it out",
    "cache_implementation": "the state of a window is the only cache; leave it out",
}


@dataclass
class RecurGPT2LMOutput(ModelOutput):
    """Output of RecurGPT2LMHeadModel.

    Attributes:
        loss: () mean cross-entropy in nats over the labels that are scored; only with labels.
        logits: (B, N, V).
        state: to go on from.
        hidden_states: as in RecurGPT2Output.
        cache: what `generate` goes on from, in place of a state; only with `use_cache`. Before transformers 5.24 it is
            called `past_key_values`, as in its own outputs.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: RecurState | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    if CACHE == NEW_CACHE:
        cache: Cache | None = None
    else:
        past_key_values: Cache | None = None


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
        held: hidden states (B, 1, D) of a token that was read already: the next step gives them and reads nothing.
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

    def step(self, input_ids: Tensor) -> Tensor:
        """Read one token of each row: (B, 1) -> hidden states (B, 1, D)."""
        self.seen += 1
        if self.held is not None:
            held, self.held = self.held, None
            return held
        return self._decoder.step(input_ids)

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


class RecurGeneration(GenerationMixin):
    """`generate` and `read` of RecurGPT2LMHeadModel."""

    _is_stateful = True  # transformers: what was read cannot be taken back

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first call makes a RecurCache

    def generate(self, inputs: Tensor | None = None, *args, state: RecurState | None = None, **kwargs):
        """As in transformers, to any length.

        Args:
            inputs: (B, N) prompt of any length, padded on the left.
            state: where the prompts' documents go on from. A state of fewer rows goes to several prompts each: one row
                to all of them. Prompts hold only what comes after it, and `attention_mask` is theirs.
            The other arguments are transformers'. With `return_dict_in_generate`, the cache in the result (`cache`;
                `past_key_values` before transformers 5.24) is a RecurCache: to be given again with the whole text so
                far, or its `state()` with what comes after what it has read.

        Raises:
            InputError: what windows do not allow: `inputs_embeds`, assisted decoding, attention weights, another kind
                of cache, padding behind a prompt.
        """
        _check(kwargs)
        cache = given_cache(kwargs.pop(NEW_CACHE, None), kwargs.pop(OLD_CACHE, None))
        if isinstance(cache, RecurState):
            cache, state = None, cache
        if state is not None:
            cache = RecurCache(self, state)
        if cache is not None:
            kwargs[CACHE] = cache
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: RecurCache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = True,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool = False,
        is_first_iteration: bool = False,
        cache: RecurCache | None = None,
    ) -> dict:
        """What transformers calls `forward` with, for the positions that were not read yet."""
        cache = given_cache(cache, past_key_values)
        if next_sequence_length is not None:
            if next_sequence_length < 1:
                raise InputError(
                    f"{CACHE} has read {cache.get_seq_length()} positions and input_ids hold {input_ids.shape[1]}; "
                    f"give the whole text so far, or state={CACHE}.state() and what comes after it"
                )
            input_ids = input_ids[:, -next_sequence_length:]
        if attention_mask is not None:
            attention_mask = attention_mask[:, -input_ids.shape[1] :]
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            CACHE: cache,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            "output_hidden_states": output_hidden_states,
        }

    @torch.no_grad()
    def read(
        self,
        text: str | Iterable,
        state: RecurState | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        parallel_windows: int = PARALLEL_WINDOWS,
        progress: bool = True,
    ) -> RecurState:
        """Read a document of any length at constant memory, or more of it.

        Args:
            text: a text, token ids (n,), or an iterable of such chunks: lists, arrays or tensors of any lengths.
            state: of one row, where it goes on from; None for the start of a document.
            tokenizer: for a text; None: the one that lies with the model.
            parallel_windows: P, windows computed at once.
            progress: show a bar.

        Returns:
            The state after all of it, to score, generate or read on from.

        Raises:
            InputError: a state of several rows, or no tokens at all and no state.
        """
        if state is not None and state.batch_size != 1:
            raise InputError(f"the state holds {state.batch_size} rows; read one document, state.select([row])")
        size = parallel_windows * self.config.window
        with tqdm(unit="tok", unit_scale=True, disable=not progress, leave=False) as bar:
            for ids in self._pieces(text, tokenizer, size):
                state = self.transformer(ids[None], state=state, parallel_windows=parallel_windows).state
                bar.update(len(ids))
        if state is None:
            raise InputError("there is nothing to read; give a text or token ids")
        return state

    def _pieces(self, text, tokenizer, size):
        """(n,) tensors of at most `size` tokens."""
        if isinstance(text, str):
            text = [_tokens(self, text, tokenizer)]
        elif hasattr(text, "__len__") and len(text) and not hasattr(text[0], "__len__"):
            text = [text]  # token ids
        for chunk in text:
            ids = _tokens(self, chunk, tokenizer) if isinstance(chunk, str) else chunk
            yield from torch.as_tensor(ids, dtype=torch.int64, device=self.device).flatten().split(size)

    def _generated(
        self, input_ids, attention_mask, cache, state, logits_to_keep, parallel_windows, output_hidden_states
    ) -> RecurGPT2LMOutput:
        """`forward` with a cache: logits, and the cache after these positions."""
        rows, positions = input_ids.shape
        if attention_mask is not None:
            attention_mask = attention_mask[:, -positions:]
        layers, step = None, cache is not None and positions == 1 and rows % cache.batch_size == 0
        if step and rows > cache.batch_size:
            cache.batch_repeat_interleave(rows // cache.batch_size)
        if step and not output_hidden_states and (attention_mask is None or bool((attention_mask != 0).all())):
            hidden = cache.step(input_ids)
        elif cache is not None and cache.held is not None:
            raise InputError(f"{CACHE} holds a token that was read already; give that one first, alone and unmasked")
        else:
            state = state if cache is None else _for_rows(cache.state(), rows)
            if output_hidden_states:
                hidden, state, layers = self.transformer(input_ids, attention_mask, state, True).to_tuple()
            else:
                hidden, state = self._read_on(input_ids, attention_mask, state, logits_to_keep, parallel_windows)
            if cache is None:
                cache = RecurCache(self, state, seen=positions)
            else:
                cache.go_on(state, seen=positions)
        logits = self.lm_head(kept_positions(hidden, logits_to_keep))
        return RecurGPT2LMOutput(logits=logits, hidden_states=layers, **{CACHE: cache})

    def _read_on(self, input_ids, attention_mask, state, logits_to_keep, parallel_windows):
        """Read a batch in pieces -> hidden states (B, N', D), of few positions if few are wanted; state."""
        size, kept = parallel_windows * self.config.window, []
        wanted = logits_to_keep if isinstance(logits_to_keep, int) and logits_to_keep else input_ids.shape[1]
        masks = [None] * input_ids.shape[1] if attention_mask is None else attention_mask.split(size, dim=1)
        for ids, mask in zip(input_ids.split(size, dim=1), masks, strict=False):
            if mask is not None and not bool(mask.any()):
                kept.append(self.lm_head.weight.new_zeros(*ids.shape, self.config.n_embd))
                continue
            out = self.transformer(ids, mask, state, parallel_windows=parallel_windows)
            state = out.state
            kept.append(out.last_hidden_state)
            while sum(each.shape[1] for each in kept[1:]) >= wanted:
                del kept[0]
        return torch.cat(kept, dim=1), state


def _check(options):
    """Refuse what windows do not allow, of the options of `generate`."""
    config = vars(options["generation_config"]) if options.get("generation_config") is not None else {}
    for name, why in NOT_POSSIBLE.items():
        given = options.get(name, config.get(name))
        if given is not None and given is not False:
            raise InputError(f"{name} cannot be used with generate(): {why}")
    mask = options.get("attention_mask")
    if mask is not None and not bool((mask[:, -1] != 0).all()):
        row = int((mask[:, -1] == 0).nonzero()[0])
        raise InputError(f"row {row} is padded behind its prompt; pad on the left (tokenizer.padding_side='left')")


def _for_rows(state, rows):
    """A state for `rows` rows: its own, or each of them several times."""
    if rows % state.batch_size:
        raise InputError(f"the state holds {state.batch_size} rows for {rows} prompts; give one for each, or one")
    if rows == state.batch_size:
        return state
    return state.select(torch.arange(state.batch_size).repeat_interleave(rows // state.batch_size))


def kept_positions(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """(B, N, D) -> (B, N', D): the last so many positions, or these; all for 0."""
    if isinstance(logits_to_keep, Tensor):
        return hidden[:, logits_to_keep]
    return hidden[:, -logits_to_keep:]


def _tokens(model, text, tokenizer):
    if tokenizer is None:
        tokenizer = load_tokenizer(model.name_or_path)
    return tokenizer(text, verbose=False)["input_ids"]
