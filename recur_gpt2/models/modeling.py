"""RecurGPT2Model and RecurGPT2LMHeadModel: a GPT-2 that reads documents of any length in windows.

Notable here:
- one function, `RecurGPT2Model._run`, takes (tokens, state) to (hidden states, next state); all else goes through it;
- windows are computed in blocks of `parallel_windows`, layer by layer, wherever memory does not make them wait;
- padding is squeezed out first, so that rows of any lengths and positions in their windows share a batch.

B rows, N tokens, W windows, T tokens a window, D model width, M memory slots, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin

from ..errors import InputError
from ..ops.cross_entropy import Shares, loss_of_logits, summed_loss
from ..ops.matmul import Head, weight_of
from ..utils.tensors import IGNORE_INDEX, product_type
from .attention_layers.softmax import AttentionHook
from .attention_weights import AttentionWeights, joined_weights
from .block import RecurGPT2Block
from .cache import RecurCache, given_cache
from .configuration import RecurGPT2Config
from .generation import PARALLEL_WINDOWS, RecurGeneration, kept_positions
from .inputs import (
    JoinedDocuments,
    check_labels,
    check_positions,
    joined_positions,
    packed_inputs,
    refuse_cross_attention,
    shape_of,
)
from .memory import Recurrence
from .outputs import CACHE, RecurGPT2LMOutput, RecurGPT2Output
from .packing import Packing
from .pointed_windows import PointedWindows
from .pointer import Pointed, pointed_logits
from .pretrained import RecurGPT2PreTrainedModel
from .schedule import CallLayer, LayerSchedule, PooledSchedule
from .state import Origin, RecurState
from .windows import NewWindows, PartialWindows


class RecurGPT2Model(RecurGPT2PreTrainedModel):
    """The transformer without a head."""

    def __init__(self, config: RecurGPT2Config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([RecurGPT2Block(config, layer_idx=layer) for layer in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.recurrence = Recurrence(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def set_input_embeddings(self, value):
        self.wte = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: RecurState | None = None,
        output_hidden_states: bool | None = None,
        parallel_windows: int = 1,
        layer: int | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        pointed: list[Pointed] | None = None,
        **flattened: Tensor | int,
    ) -> RecurGPT2Output | tuple:
        """Read any number of tokens.

        Args:
            input_ids: (B, N) int64.
            attention_mask: (B, N), 0 for padding, which may stand anywhere and changes nothing.
            state: where the rows' documents go on from; None for their start.
            output_hidden_states: return every layer's hidden states too. None: as the configuration says.
            parallel_windows: P, windows of a row to compute at once. More is faster and takes more memory; the
                results are the same.
            layer: l, to return the output of the first l layers, as transformers' hidden_states[l]; what lies above
                and moves nothing below is not computed. A state goes on only with the `layer` that left it.
            inputs_embeds: (B, N, D), in place of ids. What is given so cannot be pointed at later.
            token_type_ids: (B, N), whose embeddings are added to the tokens', as GPT-2 does; nor can these.
            position_ids: (B, N) 0 to n - 1, as they are anyhow; in a single row they may begin again at 0, where
                another document begins. Others are refused.
            output_attentions: return attention weights too, which are not made otherwise. None: as the configuration
                says.
            return_dict: False: a tuple of all that is not None. None: as the configuration says.
            use_cache: False: return no state.
            pointed: a list that takes what each of the positions (B, N) may point at, for a head.
            flattened: what collators that join documents in one row give beside position ids (`cu_seq_lens_q`, ...).

        Raises:
            InputError: the state is of another batch size or `layer`, or there are no tokens; or what windows do not
                allow.
        """
        shape, _ = shape_of(input_ids, inputs_embeds)
        position_ids, documents = joined_positions(position_ids, flattened), None
        if position_ids is not None:
            documents = JoinedDocuments.found(position_ids, attention_mask, shape[0])
        if documents is not None:
            inputs = input_ids, inputs_embeds, token_type_ids
            options = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
            options |= {"state": state, "parallel_windows": parallel_windows, "layer": layer, "use_cache": use_cache}
            options["pointed"] = pointed
            out = self._forward_joined(documents, *map(documents.rows, inputs), **options)
            return self._returned(out, return_dict)
        packing = packed_inputs(self.wte, input_ids, inputs_embeds, token_type_ids, attention_mask)
        if position_ids is not None:
            check_positions(position_ids, attention_mask, shape, goes_on=state is not None)
        depth = self._checked_depth(layer)
        state = self._checked_state(state, shape[0], depth)
        every_layer = self._configured("output_hidden_states", output_hidden_states)
        show = self._configured("output_attentions", output_attentions)
        if show and self.config.linear_layers:
            raise InputError(
                f"output_attentions=True: layers {self.config.linear_layers} have linear attention, which has no "
                f"weights to return; leave it out"
            )
        pieces, weights, before = [], [], state
        done = torch.zeros(len(packing.lengths), dtype=torch.int64)
        while bool((done < packing.lengths).any()):
            rows, windows, block, tokens = self._next_windows(packing, state, done, parallel_windows)
            hook = AttentionWeights() if show else None
            hidden, read, seen = self._run(block, windows, every_layer=every_layer, depth=depth, hook=hook)
            state = read if len(rows) == len(done) else state.merge(rows, read)
            if pointed is not None and seen is not None:
                pointed += self._pointed(packing, rows, done[rows], tokens, block.shape[1:3], seen)
            pieces.append((rows, done[rows], tokens, [h.flatten(1, 2) for h in hidden]))
            weights += [hook.layers()] if show else []
            done = done.index_add(0, rows, tokens)
        layers = packing.unpack(pieces)
        state = replace(state, origin=Origin.of(self))
        attentions = self._unpacked_weights(packing, pieces, weights, before) if show else None
        state = None if use_cache is False else state
        out = RecurGPT2Output(layers[-1], state, tuple(layers) if every_layer else None, attentions)
        return self._returned(out, return_dict)

    def _pointed(self, packing, rows, starts, tokens, shape, seen):
        """What the windows of one block may point at, by where their tokens stood. shape: W, and tokens a window."""
        found, (windows, length) = [], shape
        for window in range(windows):
            slots = seen.seen(window)
            if slots is not None:
                begin = starts + window * length
                found.append(Pointed(slots, packing.places(rows, begin, starts + tokens, length)))
        return found

    def _forward_joined(self, documents, input_ids, inputs_embeds, token_type_ids, pointed, **options):
        """Several documents in one row: hidden states (1, N, D), and a state with a row for each document."""
        beside = {"inputs_embeds": inputs_embeds, "token_type_ids": token_type_ids}
        found = None if pointed is None else []
        out = self.forward(input_ids, documents.mask, return_dict=True, pointed=found, **beside, **options)
        if found:
            pointed += [Pointed(each.slots, documents.joined_positions(each.positions)) for each in found]
        if out.attentions is not None:
            raise InputError("output_attentions=True: documents in one row cannot show theirs; give them as rows")
        layers = None if out.hidden_states is None else tuple(map(documents.joined, out.hidden_states))
        return RecurGPT2Output(documents.joined(out.last_hidden_state), out.state, layers)

    def _unpacked_weights(self, packing, pieces, weights, before) -> tuple[Tensor, ...]:
        """Attention weights of each piece -> (B, H, N, M + F) a layer; (B, H, N, N) of texts within a first window.

        Args:
            before: the state that the texts were read from.
        """
        pieces = [(*piece[:3], each) for piece, each in zip(pieces, joined_weights(weights), strict=True)]
        layers = [each.unflatten(2, (self.config.n_head, -1)).transpose(1, 2) for each in packing.unpack(pieces)]
        length = packing.tokens.shape[1]
        if length <= self.config.window and not (before.windows + before.filled).any():
            # Keys stand where their tokens do, as in GPT-2.
            layers = [nn.functional.pad(each, (0, length - each.shape[-1])).transpose(1, 3) for each in layers]
            layers = [packing.spread(each).transpose(1, 3) for each in layers]
        return tuple(each.contiguous() for each in layers)

    def forward_windows(
        self,
        input_ids: Tensor,
        starts: Tensor,
        state: RecurState | None = None,
        call_layer: CallLayer | None = None,
        pointed: list[Pointed] | None = None,
    ) -> tuple[Tensor, RecurState]:
        """W whole windows of each row at once: what training iterates over.

        Args:
            input_ids: (B, W, T) int64, T = config.window. A window whose document ends in it is padded at its end.
            starts: (B, W) bool on the CPU, whether a document starts at the window. The window after a padded one
                must start a document.
            state: before the first window.
            call_layer: calls each layer, `call_layer(layer, *tensors)`, in place of us, and may do so again later: what
                recomputation hooks into.
            pointed: a list that takes what each of the positions (B, W, T) may point at, for a head.

        Returns:
            Hidden states (B, W, T, D) after the final layer norm, and the state after the last window.
        """
        return self._forward_windows(input_ids, starts, state, pointed, call_layer=call_layer)

    def _forward_windows(self, input_ids, starts, state, pointed=None, **options):
        rows, windows, length = input_ids.shape
        state = self._checked_state(state, rows, self.config.n_layer)
        has_memory = torch.ones(rows, windows, dtype=torch.bool)
        has_memory[:, 0] = state.windows > 0
        tokens = torch.full((rows,), windows * length)
        block = NewWindows(state, has_memory & ~starts, tokens, self.config.window)
        hidden, state, seen = self._run(input_ids, block, **options)
        if pointed is not None and seen is not None:
            positions = torch.arange(rows * windows * length).view(rows, windows, length)
            slots = {window: seen.seen(window) for window in range(windows)}
            pointed += [Pointed(each, positions[:, n]) for n, each in slots.items() if each is not None]
        return hidden[-1], state

    def softmax_forward(self, input_ids: Tensor, starts: Tensor) -> Tensor:
        """`forward_windows` from no state, with softmax attention in all layers, as before conversion."""
        return self._forward_windows(input_ids, starts, None, hook=lambda *_: None)[0]

    def teacher_forward(
        self, input_ids: Tensor, starts: Tensor, state: RecurState | None, hook: AttentionHook
    ) -> RecurState:
        """`forward_windows` with softmax attention in all layers, as before conversion; returns the state alone.

        Args:
            hook: called in every layer, with the block, its queries and keys (B, W, H, T, d), keys of its memory
                (B, W, H, M, d) or None, and the windows.
        """
        return self._forward_windows(input_ids, starts, state, hook=hook)[1]

    def _checked_depth(self, layer):
        layers = self.config.n_layer
        if layer is None or 0 <= layer <= layers:
            return layers if layer is None else layer
        raise InputError(f"layer={layer} does not exist; give 0, the embeddings, to {layers}, the last layer")

    def _checked_state(self, state, rows, depth):
        if state is None:
            return RecurState.empty(rows)
        if state.batch_size != rows:
            raise InputError(f"the state holds {state.batch_size} rows and input_ids {rows}; give one row for each")
        state.checked_for(self)
        layers = set(map(str, range(depth)))
        needed = {*(layers & set(self.recurrence.names()) if state.memory else ()), *(layers if state.window else ())}
        if needed - {key.split(".")[-1] for key in state.memory | state.window}:
            raise InputError(f"the state was left by fewer layers than the {depth} to read; give the same `layer`")
        return state.to(self.wte.weight.device, product_type(self.wte.weight))

    def _next_windows(self, packing, state, done, parallel_windows):
        """What to read next: first fill windows that are not full, then whole windows, then tails."""
        window = self.config.window
        left = packing.lengths - done
        resumed = (left > 0) & (state.filled > 0)
        rows = (resumed if bool(resumed.any()) else left > 0).nonzero().squeeze(1)
        left, picked = left[rows], state if len(rows) == len(done) else state.select(rows)
        if bool(resumed.any()):
            tokens = torch.minimum(left, window - picked.filled)
            has_memory = (picked.windows > 0)[:, None]
            block = PartialWindows(picked, has_memory, tokens, window)
            return rows, block, packing.take(rows, done[rows], int(tokens.max()))[:, None], tokens
        windows = int(left.max()) // window
        windows = max(1, min(windows, parallel_windows))
        tokens = left.clamp_max(windows * window)
        has_memory = torch.ones(len(rows), windows, dtype=torch.bool)
        has_memory[:, 0] = picked.windows > 0
        ids = packing.take(rows, done[rows], int(tokens.max()) if windows == 1 else windows * window)
        return rows, NewWindows(picked, has_memory, tokens, window), ids.unflatten(1, (windows, -1)), tokens

    def _run(self, tokens, windows, *, every_layer=False, depth=None, **options):
        """(B, W, T) ids or (B, W, T, D) embeddings -> list of hidden states (B, W, T, D) of the first `depth` layers,
        or the last; state; what may be pointed at, if anything."""
        depth = self.config.n_layer if depth is None else depth
        positions = windows.positions(tokens.shape[2], self.config.position_offset).to(tokens.device)
        ids = tokens if tokens.ndim == 3 else None
        embedded = self.drop((tokens if ids is None else self.wte(ids)) + self.wpe(positions))
        form = PooledSchedule if self.config.pool_layers else LayerSchedule
        schedule = form(self, windows, depth=depth, every_layer=every_layer, **options)
        hidden = schedule.run(embedded)
        hidden = [embedded, *hidden] if every_layer or not hidden else hidden[-1:]
        del embedded
        seen, memory = None, self.recurrence.pointer
        if depth == self.config.n_layer:
            hidden[-1] = self.ln_f(hidden[-1])
            if memory is not None:
                seen = PointedWindows(memory, windows, memory.positions(hidden[-1], ids))
                seen.leave(schedule.memory, schedule.window)
        return hidden, windows.next_state(schedule.memory, schedule.window), seen


class RecurGPT2LMHeadModel(RecurGPT2PreTrainedModel, RecurGeneration, GenerationMixin):  # named: transformers looks
    """The transformer with GPT-2's language-modeling head (tied to the embeddings unless the configuration says no)."""

    accepts_loss_kwargs = True  # transformers' Trainer: num_items_in_batch
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012 (transformers reads it so)

    def __init__(self, config: RecurGPT2Config):
        super().__init__(config)
        self.transformer = RecurGPT2Model(config)
        self.lm_head = Head(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        state: RecurState | None = None,
        output_hidden_states: bool | None = None,
        parallel_windows: int = 1,
        past_key_values: RecurCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cache: RecurCache | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **flattened: Tensor | int,
    ) -> RecurGPT2LMOutput | tuple:
        """Read any number of tokens and predict each one's successor.

        Args:
            labels: (B, N) int64, as `input_ids`: they are shifted inside, so that the first one is predicted by no
                position. -100 is not scored, nor is padding.
            cache: what `generate` carries, in place of a state; it is changed, and returned. With it, logits at padding
                are those of the row's token before.
            past_key_values: the same, under its name before transformers 5.24.
            use_cache: True: return a cache in place of a state; False: neither.
            logits_to_keep: predict at the last so many positions alone, or at these; 0 for all.
            num_items_in_batch: what the summed loss is divided by, in place of the number of labels that are scored:
                transformers' Trainer counts them over all that it accumulates.
            encoder_hidden_states, encoder_attention_mask: refused.
            The other arguments are those of RecurGPT2Model.

        Raises:
            InputError: as RecurGPT2Model, or labels of another shape, or with a cache.
        """
        refuse_cross_attention(
            encoder_hidden_states=encoder_hidden_states, encoder_attention_mask=encoder_attention_mask
        )
        check_labels(labels, *shape_of(input_ids, inputs_embeds))
        cache, position_ids = given_cache(cache, past_key_values), joined_positions(position_ids, flattened)
        options = {"inputs_embeds": inputs_embeds, "token_type_ids": token_type_ids, "position_ids": position_ids}
        options["output_hidden_states"] = self._configured("output_hidden_states", output_hidden_states)
        options["output_attentions"] = self._configured("output_attentions", output_attentions)
        if cache is not None or use_cache:
            if labels is not None or (cache is not None and state is not None):
                raise InputError(f"{CACHE} cannot be combined with labels or a state; give a state in its place")
            windows = max(parallel_windows, PARALLEL_WINDOWS)
            out = self._generated(input_ids, attention_mask, cache, state, logits_to_keep, windows, options)
            return self._returned(out, return_dict)
        pointed: list[Pointed] = []
        read = self.transformer(
            input_ids,
            attention_mask,
            state,
            parallel_windows=parallel_windows,
            return_dict=True,
            pointed=pointed,
            **options,
        )
        hidden = read.last_hidden_state
        places = torch.arange(hidden.shape[:2].numel()).view(hidden.shape[:2])
        logits, loss = self._logits(hidden, kept_positions(places, logits_to_keep), pointed), None
        if labels is not None:
            all_logits = None if isinstance(logits_to_keep, Tensor) or logits_to_keep else logits
            loss = self._loss(hidden, all_logits, pointed, labels, attention_mask, num_items_in_batch)
        state = None if use_cache is False else read.state
        out = RecurGPT2LMOutput(loss, logits, state, read.hidden_states, read.attentions)
        return self._returned(out, return_dict)

    def _logits(self, hidden, places, pointed):
        """Hidden states (B, N, D) -> logits (B, K, V) at places (B, K) of them, all rows counted through."""
        flat = places.flatten()
        kept = hidden.flatten(0, 1)[flat.to(hidden.device)]
        logits = self.lm_head(kept)
        memory = self.transformer.recurrence.pointer
        if memory is not None:
            logits = pointed_logits(memory, logits, kept, flat, pointed)
        return logits.unflatten(0, places.shape)

    def predict(
        self, input_ids: Tensor, attention_mask: Tensor | None, spans: list[tuple[int, int]], parallel_windows: int = 1
    ) -> list[Tensor]:
        """Logits (n, V) at some positions of each row alone, from the start of its document.

        Args:
            spans: of each row, the first of its positions, and the one behind the last.
            The other arguments are those of RecurGPT2Model.
        """
        pointed: list[Pointed] = []
        options = {"parallel_windows": parallel_windows, "return_dict": True, "use_cache": False}
        hidden = self.transformer(input_ids, attention_mask, pointed=pointed, **options).last_hidden_state
        rows = enumerate(spans)
        places = torch.cat([torch.arange(start, end) + row * hidden.shape[1] for row, (start, end) in rows])
        return list(self._logits(hidden, places[None], pointed)[0].split([end - start for start, end in spans]))

    def read_windows(
        self,
        input_ids: Tensor,
        targets: Tensor,
        starts: Tensor,
        state: RecurState | None = None,
        call_layer: CallLayer | None = None,
    ) -> tuple[Tensor, Shares | None, RecurState]:
        """RecurGPT2Model.forward_windows, and what the head's mixture gives: all that the loss is made from.

        Args:
            targets: (B, W, T) int64, the tokens that follow; -100 where nothing is scored.

        Returns:
            Hidden states (B, W, T, D); shares of the mixture, (B, W, T) each, None for a model that has no pointers;
            and the state after the last window.
        """
        pointed: list[Pointed] = []
        hidden, state = self.transformer.forward_windows(input_ids, starts, state, call_layer, pointed)
        return hidden, self._shares(hidden, targets, pointed), state

    def _shares(self, hidden, targets, pointed) -> Shares | None:
        """Of the head's mixture; None where the model does not point."""
        memory = self.transformer.recurrence.pointer
        return None if memory is None else memory.shares(hidden, targets, pointed)

    def _loss(self, hidden, logits, pointed, labels, attention_mask, num_items_in_batch):
        """Of all logits, if they are there; of hidden states otherwise."""
        packing = Packing(labels, attention_mask)
        targets = nn.functional.pad(packing.tokens[:, 1:], (0, 1), value=IGNORE_INDEX)
        inside = torch.arange(targets.shape[1]) < packing.lengths[:, None] - 1
        targets = packing.unpacked(targets.masked_fill(~inside.to(targets.device), IGNORE_INDEX)).to(hidden.device)
        if logits is not None:
            total = loss_of_logits(logits, targets)
        else:  # a few rows' logits were kept: the others are never made
            total = summed_loss(hidden, weight_of(self.lm_head), targets, self._shares(hidden, targets, pointed))
        items = (targets != IGNORE_INDEX).sum().clamp_min(1) if num_items_in_batch is None else num_items_in_batch
        return total / (items.to(total.device) if isinstance(items, Tensor) else items)


AutoConfig.register(RecurGPT2Config.model_type, RecurGPT2Config)
AutoModel.register(RecurGPT2Config, RecurGPT2Model)
AutoModelForCausalLM.register(RecurGPT2Config, RecurGPT2LMHeadModel)
