"""RecurGPT2Model and RecurGPT2LMHeadModel: a GPT-2 that reads documents of any length in windows.

Notable here:
- one function, `RecurGPT2Model.read`, takes (tokens, state) to (hidden states, next state); all else walks through it;
- windows are computed in blocks of `parallel_windows`, layer by layer, wherever memory does not make them wait;
- padding is squeezed out first, so that rows of any lengths and places in their windows share a batch.

B rows, N tokens, W windows, T tokens a window, D model width, M memory slots, V vocabulary.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin
from transformers.models.gpt2.modeling_gpt2 import GPT2PreTrainedModel

from .configuration import OWN_FIELDS, RecurGPT2Config, with_window
from .errors import InputError
from .feature_maps import FeatureMap
from .generation import (
    CACHE,
    PARALLEL_WINDOWS,
    RecurCache,
    RecurGeneration,
    RecurGPT2LMOutput,
    given_cache,
    kept_places,
)
from .initialization import fit_feature_maps, fit_slots, load_gpt2
from .layers import STATE_DECAY, RecurGPT2Block, is_new
from .losses import IGNORE, loss_of_logits, summed_loss
from .near_attention import FarGate
from .outputs import RecurGPT2Output
from .padding import Packing
from .products import Head
from .reading import FreshWindows, ResumedWindows
from .recurrence import LayerMemory, PooledMemory, make_recurrence, product_type
from .state import Origin, RecurState
from .walking import LayerWalk, PooledWalk, RunLayer, Teach

NO_LIMIT = int(1e30)  # as transformers says that a tokenizer has none
NEW_MODULES = LayerMemory | PooledMemory | FeatureMap | FarGate  # what GPT-2 has not


class RecurGPT2PreTrainedModel(GPT2PreTrainedModel):
    config: RecurGPT2Config
    config_class = RecurGPT2Config
    base_model_prefix = "transformer"
    _no_split_modules = ("RecurGPT2Block",)
    _can_record_outputs = None
    _supports_flash_attn = False
    supports_gradient_checkpointing = False

    def gradient_checkpointing_enable(self, *_, **__):
        """Refused: transformers' switch wraps whole layers, and these are read in parts."""
        raise InputError(
            "gradient checkpointing cannot be switched on here; recur-gpt2 finetune --checkpointing recomputes windows "
            "in the backward pass"
        )

    activation_checkpointing_enable = gradient_checkpointing_enable  # its name from transformers 5.24 on

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, NEW_MODULES):
            module.reset_parameters()

    @classmethod
    def from_gpt2(cls, name_or_path: str, *, window: int = 256, recurrence: str = "default", **options):
        """Give any GPT-2 checkpoint windows and a recurrence. The result computes exactly GPT-2 in a first window.

        Args:
            name_or_path: a hub id or a folder that `transformers` can load a GPT-2 from.
            window: T, tokens a window.
            recurrence: "default", "yoshida2020" or "none".
            options: other fields of RecurGPT2Config.

        Raises:
            InputError: the checkpoint is missing, damaged or of another architecture, or a field is out of range.
        """
        unknown = [name for name in options if name not in cls.config_class.__dataclass_fields__]
        if unknown:
            raise InputError(
                f"{unknown[0]!r} is no field of RecurGPT2Config; it has {', '.join(OWN_FIELDS)} and GPT-2's"
            )
        base = load_gpt2(name_or_path)
        options |= {"recurrence": recurrence, "architectures": [cls.__name__]}
        with torch.device("meta"):  # the weights are taken over, not copied
            model = cls(with_window(base.config, window, **options))
        source = base if hasattr(model, "lm_head") else base.transformer
        missing, unexpected = model.load_state_dict(source.state_dict(), strict=False, assign=True)
        alien = [name for name in missing if not is_new(name)] + unexpected
        if alien:
            raise InputError(f"{name_or_path} does not hold a whole GPT-2; these weights do not fit: {alien[:5]}")
        _make_new_parameters(model, base.dtype)
        core = getattr(model.eval(), "transformer", model)
        fit_slots(core)
        fit_feature_maps(core)
        return model

    def fuse_feature_maps(self):
        """Fold the feature maps of linear layers into their projections of queries and keys, for faster inference.

        Exact up to rounding. The folded weights are a copy, which is not saved: call this again after the weights have
        changed. `train()` undoes it. Maps that are not affine before their nonlinearity (elu, rfa), and layers with
        `near_tokens`, which need queries and keys themselves, stay as they are.

        Returns:
            The model itself.
        """
        for block in getattr(self, "transformer", self).h:
            block.fuse_feature_map()
        return self

    def train(self, mode: bool = True):
        """As in PyTorch; training goes on with the feature maps themselves."""
        if mode:
            for block in getattr(self, "transformer", self).h:
                block.unfuse_feature_map()
        return super().train(mode)

    @classmethod
    def from_pretrained(cls, *args, dtype=torch.float32, **kwargs):
        """As in transformers, but weights in 16 bit are widened unless `dtype` says otherwise ("auto": as saved)."""
        return super().from_pretrained(*args, dtype=dtype, **kwargs)

    def save_pretrained(self, save_directory, *args, tokenizer=None, **kwargs):
        """As in transformers; with `tokenizer`, its files are saved beside the model, for texts of any length."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if tokenizer is not None:
            tokenizer = copy(tokenizer)
            tokenizer.model_max_length = NO_LIMIT
            tokenizer.save_pretrained(save_directory)


class RecurGPT2Model(RecurGPT2PreTrainedModel):
    """The transformer without a head."""

    def __init__(self, config: RecurGPT2Config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([RecurGPT2Block(config, layer_idx=layer) for layer in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.recurrence = make_recurrence(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def set_input_embeddings(self, value):
        self.wte = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        state: RecurState | None = None,
        output_hidden_states: bool = False,
        parallel_windows: int = 1,
        layer: int | None = None,
    ) -> RecurGPT2Output:
        """Read any number of tokens.

        Args:
            input_ids: (B, N) int64.
            attention_mask: (B, N), 0 for padding, which may stand anywhere and changes nothing.
            state: where the rows' documents go on from; None for their start.
            output_hidden_states: return every layer's hidden states too.
            parallel_windows: P, windows of a row to compute at once. More is faster and takes more memory; the
                results are the same.
            layer: l, to return the output of the first l layers, as transformers' hidden_states[l]; what lies above
                and moves nothing below is not computed. A state goes on only with the `layer` that left it.

        Raises:
            InputError: the state is of another batch size or `layer`, or there are no tokens.
        """
        if input_ids.ndim != 2 or not input_ids.numel():
            raise InputError(f"input_ids of shape {tuple(input_ids.shape)} hold no tokens; give (batch, tokens)")
        packing = Packing(input_ids, attention_mask)
        if not bool(packing.lengths.any()):
            raise InputError("attention_mask is 0 everywhere; give at least one token")
        depth = self._checked_depth(layer)
        state = self._checked_state(state, len(input_ids), depth)
        pieces = []
        done = torch.zeros(len(input_ids), dtype=torch.int64)
        while bool((done < packing.lengths).any()):
            rows, stretch, ids, tokens = self._next_stretch(packing, state, done, parallel_windows)
            hidden, read = self._run(ids, stretch, every_layer=output_hidden_states, depth=depth)
            state = read if len(rows) == len(done) else state.merge(rows, read)
            pieces.append((rows, done[rows], tokens, [h.flatten(1, 2) for h in hidden]))
            done = done.index_add(0, rows, tokens)
        layers = packing.unpack(pieces)
        state = replace(state, origin=Origin.of(self))
        return RecurGPT2Output(layers[-1], state, tuple(layers) if output_hidden_states else None)

    def read(
        self,
        input_ids: Tensor,
        starts: Tensor,
        state: RecurState | None = None,
        run_layer: RunLayer | None = None,
    ) -> tuple[Tensor, RecurState]:
        """Read W whole windows of each row at once: what training iterates over.

        Args:
            input_ids: (B, W, T) int64, T = config.window. A window whose document ends in it is padded at its end.
            starts: (B, W) bool on the CPU, whether a document starts at the window. The window after a padded one
                must start a document.
            state: before the first window.
            run_layer: calls each layer, `run_layer(layer, *tensors)`, in place of us, and may do so again later: what
                recomputation hooks into.

        Returns:
            Hidden states (B, W, T, D) after the final layer norm, and the state after the last window.
        """
        return self._read(input_ids, starts, state, run_layer=run_layer)

    def _read(self, input_ids, starts, state, **options):
        rows, windows, length = input_ids.shape
        state = self._checked_state(state, rows, self.config.n_layer)
        has_memory = torch.ones(rows, windows, dtype=torch.bool)
        has_memory[:, 0] = state.windows > 0
        tokens = torch.full((rows,), windows * length)
        stretch = FreshWindows(state, has_memory & ~starts, tokens, self.config.window)
        hidden, state = self._run(input_ids, stretch, **options)
        return hidden[-1], state

    def read_softly(self, input_ids: Tensor, starts: Tensor) -> Tensor:
        """`read`, from no state, with softmax attention in all layers, as before conversion -> hidden states."""
        return self._read(input_ids, starts, None, teach=lambda *_: None)[0]

    def teach(self, input_ids: Tensor, starts: Tensor, state: RecurState | None, teach: Teach) -> RecurState:
        """`read` with softmax attention in all layers, as before conversion -> the state after the last window.

        Args:
            teach: called in every layer whose own attention is linear, with the block, its queries and keys
                (B, W, H, T, d), keys of its memory (B, W, H, M, d) or None, and which windows have memory.
        """
        return self._read(input_ids, starts, state, teach=teach)[1]

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
        needed = {*(layers & set(self.recurrence) if state.memory else ()), *(layers if state.window else ())}
        if needed - {key.split(".")[-1] for key in state.memory | state.window}:
            raise InputError(f"the state was left by fewer layers than the {depth} to read; give the same `layer`")
        return state.to(self.wte.weight.device, product_type(self.wte.weight))

    def _next_stretch(self, packing, state, done, parallel_windows):
        """What to read next: first fill windows that are not full, then whole windows, then tails."""
        window = self.config.window
        left = packing.lengths - done
        resumed = (left > 0) & (state.filled > 0)
        rows = (resumed if bool(resumed.any()) else left > 0).nonzero().squeeze(1)
        left, picked = left[rows], state if len(rows) == len(done) else state.select(rows)
        if bool(resumed.any()):
            tokens = torch.minimum(left, window - picked.filled)
            has_memory = (picked.windows > 0)[:, None]
            stretch = ResumedWindows(picked, has_memory, tokens, window)
            return rows, stretch, packing.take(rows, done[rows], int(tokens.max()))[:, None], tokens
        windows = int(left.max()) // window
        windows = max(1, min(windows, parallel_windows))
        tokens = left.clamp_max(windows * window)
        has_memory = torch.ones(len(rows), windows, dtype=torch.bool)
        has_memory[:, 0] = picked.windows > 0
        ids = packing.take(rows, done[rows], int(tokens.max()) if windows == 1 else windows * window)
        return rows, FreshWindows(picked, has_memory, tokens, window), ids.view(len(rows), windows, -1), tokens

    def _run(self, input_ids, stretch, *, every_layer=False, depth=None, **options):
        """(B, W, T) tokens -> list of hidden states (B, W, T, D) of the first `depth` layers, or the last; state."""
        depth = self.config.n_layer if depth is None else depth
        positions = stretch.positions(input_ids.shape[2], self.config.position_offset).to(input_ids.device)
        embedded = self.drop(self.wte(input_ids) + self.wpe(positions))
        form = PooledWalk if self.config.pool_layers else LayerWalk
        walk = form(self, stretch, depth=depth, every_layer=every_layer, **options)
        hidden = walk.run(embedded)
        hidden = [embedded, *hidden] if every_layer or not hidden else hidden[-1:]
        del embedded
        if depth == self.config.n_layer:
            hidden[-1] = self.ln_f(hidden[-1])
        return hidden, stretch.next_state(walk.memory, walk.window)


class RecurGPT2LMHeadModel(RecurGPT2PreTrainedModel, RecurGeneration, GenerationMixin):  # named: transformers looks
    """The transformer with GPT-2's language-modeling head (tied to the embeddings unless the configuration says no)."""

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
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        state: RecurState | None = None,
        output_hidden_states: bool = False,
        parallel_windows: int = 1,
        past_key_values: RecurCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool = True,
        cache: RecurCache | None = None,
    ) -> RecurGPT2LMOutput:
        """Read any number of tokens and predict each one's successor.

        Args:
            labels: (B, N) int64, as `input_ids`: they are shifted inside, so that the first one is predicted by no
                position. -100 is not scored, nor is padding.
            cache: what `generate` carries, in place of a state; it is changed, and returned.
            past_key_values: the same, under its name before transformers 5.24.
            use_cache: True: return a cache in place of a state; False: neither.
            logits_to_keep: predict at the last so many places alone, or at these; 0 for all.
            return_dict: what transformers calls with; there is no other form.
            The other arguments are those of RecurGPT2Model.

        Raises:
            InputError: as RecurGPT2Model, or labels of another shape, or with a cache.
        """
        cache = given_cache(cache, past_key_values)
        if cache is not None or use_cache:
            if labels is not None or (cache is not None and state is not None):
                raise InputError(f"{CACHE} cannot be combined with labels or a state; give a state in its place")
            windows = max(parallel_windows, PARALLEL_WINDOWS)
            cached = input_ids, attention_mask, cache, state, logits_to_keep, windows, output_hidden_states
            return self._generated(*cached)
        if labels is not None and labels.shape != input_ids.shape:
            raise InputError(
                f"labels have shape {tuple(labels.shape)}; give that of input_ids, {tuple(input_ids.shape)}"
            )
        out = self.transformer(input_ids, attention_mask, state, output_hidden_states, parallel_windows)
        logits, loss = self.lm_head(kept_places(out.last_hidden_state, logits_to_keep)), None
        if labels is not None:
            all_logits = None if isinstance(logits_to_keep, Tensor) or logits_to_keep else logits
            loss = self._loss(out.last_hidden_state, all_logits, labels, attention_mask)
        state = None if use_cache is False else out.state
        return RecurGPT2LMOutput(loss, logits, state, out.hidden_states)

    def _loss(self, hidden, logits, labels, attention_mask):
        """Of all logits, if they are there; of hidden states otherwise."""
        packing = Packing(labels, attention_mask)
        targets = nn.functional.pad(packing.ids[:, 1:], (0, 1), value=IGNORE)
        inside = torch.arange(targets.shape[1]) < packing.lengths[:, None] - 1
        targets = packing.unpacked(targets.masked_fill(~inside.to(targets.device), IGNORE))
        if logits is not None:
            total = loss_of_logits(logits, targets)
        else:  # a few rows' logits were kept: the others are never made
            total = summed_loss(hidden, self.lm_head.weight, targets)
        return total / (targets != IGNORE).sum().clamp_min(1)


def _make_new_parameters(model, dtype):
    """Tie the weights again, and make the parameters that are none of GPT-2's: the same ones each time."""
    model.tie_weights()
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.is_meta:
                made = torch.empty_like(tensor, dtype=dtype, device="cpu")
                setattr(module, name, nn.Parameter(made) if isinstance(tensor, nn.Parameter) else made)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # a GPU's numbers are left alone
        for module in model.modules():
            if isinstance(module, NEW_MODULES):
                module.reset_parameters()
            elif isinstance(module, RecurGPT2Block) and module.state_decay is not None:
                module.state_decay.fill_(STATE_DECAY)


AutoConfig.register(RecurGPT2Config.model_type, RecurGPT2Config)
AutoModel.register(RecurGPT2Config, RecurGPT2Model)
AutoModelForCausalLM.register(RecurGPT2Config, RecurGPT2LMHeadModel)
