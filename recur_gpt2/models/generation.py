"""transformers' `generate()` on our models, for text of any length at constant memory; and reading on from a state.

All that touches transformers' `generate` stands here and in cache.py. It was run with transformers 5.17.0, 5.18.0,
5.19.0, 5.20.2, 5.21.1, 5.22.2, 5.23.0 and 5.24.0. Not for what a token does inside the model: see decoder.py.

B rows, N positions, T tokens a window, D model width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationMixin, PreTrainedTokenizerBase

from ..errors import InputError
from .cache import RecurCache, given_cache
from .hub import load_tokenizer
from .inputs import check_positions, shape_of
from .outputs import CACHE, NEW_CACHE, OLD_CACHE, RecurGPT2LMOutput
from .packing import has_padding
from .pointer import Pointed
from .state import RecurState

PARALLEL_WINDOWS = 4  # of a prompt, read at once
# Whatever the configuration asks for beside it.
PLAIN_OUTPUT = {"output_hidden_states": False, "output_attentions": False, "return_dict": True}
NOT_POSSIBLE = {
    "assistant_model": "tokens that are not kept would have to be forgotten again; leave it out",
    "prompt_lookup_num_tokens": "tokens that are not kept would have to be forgotten again; leave it out",
    "assistant_early_exit": "tokens that are not kept would have to be forgotten again; leave it out",
    "cache_implementation": "the state of a window is the only cache; leave it out",
}


class RecurGeneration(GenerationMixin):
    """`generate` and `read` of RecurGPT2LMHeadModel."""

    _is_stateful = True  # transformers: what was read cannot be taken back

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first call makes a RecurCache

    def generate(self, inputs: Tensor | None = None, *args, state: RecurState | None = None, **kwargs):
        """As in transformers, to any length.

        Args:
            inputs: (B, N) prompt of any length. Padding may stand anywhere, where `attention_mask` says so.
            state: where the prompts' documents go on from. A state of fewer rows goes to several prompts each: one row
                to all of them. Prompts hold only what comes after it, and `attention_mask` is theirs.
            The other arguments are transformers'. With `return_dict_in_generate`, the cache in the result (`cache`;
                `past_key_values` before transformers 5.24) is a RecurCache: to be given again with the whole text so
                far, or its `state()` with what comes after what it has read.

        Raises:
            InputError: what windows do not allow: assisted decoding, another kind of cache.
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
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        cache: RecurCache | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs,
    ) -> dict:
        """What transformers calls `forward` with, for the positions that were not read yet."""
        cache = given_cache(cache, past_key_values)
        name = "input_ids" if inputs_embeds is None or not is_first_iteration else "inputs_embeds"
        tokens = input_ids if name == "input_ids" else inputs_embeds
        if next_sequence_length is not None:
            if next_sequence_length < 1:
                raise InputError(
                    f"{CACHE} has read {cache.get_seq_length()} positions and {name} hold {tokens.shape[1]}; "
                    f"give the whole text so far, or state={CACHE}.state() and what comes after it"
                )
            tokens = tokens[:, -next_sequence_length:]
        beside = {"attention_mask": attention_mask}
        if is_first_iteration:  # afterwards positions are counted on, and tokens are of no type
            beside |= {"token_type_ids": token_type_ids, "position_ids": position_ids}
        last = {each: None if given is None else given[:, -tokens.shape[1] :] for each, given in beside.items()}
        return {name: tokens, CACHE: cache, **last, **kwargs}

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
                out = self.transformer(ids[None], None, state, parallel_windows=parallel_windows, **PLAIN_OUTPUT)
                state = out.state
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
        self, input_ids, attention_mask, cache, state, logits_to_keep, parallel_windows, options
    ) -> RecurGPT2LMOutput:
        """`forward` with a cache: logits, and the cache after these positions. `options`: other arguments of it."""
        (rows, positions), _ = shape_of(input_ids, options["inputs_embeds"])
        if attention_mask is not None:
            attention_mask = attention_mask[:, -positions:]
        positions_given = options.pop("position_ids")
        if positions_given is not None:
            check_positions(positions_given, attention_mask, (rows, positions), cache is not None or state is not None)
        asked = any(given is not None and given is not False for given in options.values())
        step = cache is not None and positions == 1 and rows % cache.batch_size == 0
        if step and rows > cache.batch_size:
            cache.batch_repeat_interleave(rows // cache.batch_size)
        layers = attentions = None
        if step and not asked and not has_padding(attention_mask):
            logits = kept_positions(self.step(cache, input_ids), logits_to_keep)
        elif cache is not None and cache.held is not None:
            raise InputError(f"{CACHE} holds a token that was read already; give that one first, alone and unmasked")
        else:
            state = state if cache is None else _for_rows(cache.state(), rows)
            kept = kept_positions(torch.arange(positions)[None], logits_to_keep)[0]
            if asked:
                logits, state, layers, attentions = self._read_whole(input_ids, attention_mask, state, kept, options)
                if attentions and cache is not None and cache.seen + positions <= self.config.window:
                    missing = cache.seen + positions - attentions[0].shape[-1]  # pads of earlier steps
                    attentions = tuple(nn.functional.pad(each, (0, missing)) for each in attentions)
            else:
                logits, state = self._read_on(input_ids, attention_mask, state, kept, parallel_windows)
            if cache is None:
                cache = RecurCache(self, state, seen=positions)
            else:
                cache.go_on(state, seen=positions)
        return RecurGPT2LMOutput(logits=logits, hidden_states=layers, attentions=attentions, **{CACHE: cache})

    def step(self, cache: RecurCache, input_ids: Tensor) -> Tensor:
        """Read one token of each row: (B, 1) -> logits (B, 1, V)."""
        if cache.held is not None:
            cache.seen += 1
            logits, cache.held = cache.held, None
            return logits
        hidden, slots = cache.step(input_ids)
        logits, memory = self.lm_head(hidden), self.transformer.recurrence.pointer
        return logits if slots is None else memory.logits(logits, hidden, slots)

    def _read_whole(self, input_ids, attention_mask, state, kept, options):
        """Read a batch at once -> logits (B, K, V) at `kept` positions; state; each layer's hidden states, and its
        attention."""
        pointed: list[Pointed] = []
        out = self.transformer(input_ids, attention_mask, state, return_dict=True, pointed=pointed, **options)
        sources = _sources(attention_mask, out.last_hidden_state.shape[:2])[:, kept]
        logits = self._predicted(out.last_hidden_state, sources, pointed, None)
        return logits, out.state, out.hidden_states, out.attentions

    def _read_on(self, input_ids, attention_mask, state, kept, parallel_windows):
        """Read a batch in pieces -> logits (B, K, V) at `kept` positions (K,); state."""
        size, found, places, before = parallel_windows * self.config.window, [], [], None
        masks = [None] * input_ids.shape[1] if attention_mask is None else attention_mask.split(size, dim=1)
        for number, (ids, mask) in enumerate(zip(input_ids.split(size, dim=1), masks, strict=False)):
            pointed: list[Pointed] = []
            if mask is not None and not bool(mask.any()):
                hidden = self.transformer.wte.weight.new_zeros(*ids.shape, self.config.n_embd)
            else:
                options = {"parallel_windows": parallel_windows, "pointed": pointed} | PLAIN_OUTPUT
                out = self.transformer(ids, mask, state, **options)
                state, hidden = out.state, out.last_hidden_state
            inside = (kept >= number * size) & (kept < number * size + ids.shape[1])
            sources, places = _sources(mask, ids.shape), [*places, inside.nonzero().squeeze(1)]
            found.append(self._predicted(hidden, sources[:, kept[inside] - number * size], pointed, before))
            if attention_mask is not None:  # pads of the next piece are predicted where its tokens ended
                before = self._predicted(hidden, sources[:, -1:], pointed, before)
        order = torch.cat(places).argsort().to(self.device)
        return torch.cat(found, dim=1)[:, order], state

    def _predicted(self, hidden, sources, pointed, before):
        """Logits (B, K, V) at positions (B, K) of hidden states (B, N, D); at -1 `before` (B, 1, V), or zeros."""
        first = torch.arange(len(sources))[:, None] * hidden.shape[1]
        logits = self._logits(hidden, first + sources.clamp_min(0), pointed)
        nowhere = (sources < 0).to(logits.device)[..., None]
        if not bool(nowhere.any()):
            return logits
        return torch.where(nowhere, torch.zeros_like(logits[:, :1]) if before is None else before, logits)


def _sources(mask, shape):
    """(B, N) where each position's successor is predicted: there, or for a pad at the token before it; -1 for none."""
    positions = torch.arange(shape[1])
    if not has_padding(mask):
        return positions.expand(shape)
    return (positions + 1).mul(mask.cpu() != 0).cummax(dim=1).values - 1


def _check(options):
    """Refuse what windows do not allow, of the options of `generate`."""
    config = vars(options["generation_config"]) if options.get("generation_config") is not None else {}
    for name, why in NOT_POSSIBLE.items():
        given = options.get(name, config.get(name))
        if given is not None and given is not False:
            raise InputError(f"{name} cannot be used with generate(): {why}")


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
