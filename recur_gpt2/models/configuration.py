"""RecurGPT2Config: GPT-2's own configuration plus the window, the recurrence and linear attention.

A preset (`recurrence="default" | "yoshida2020" | "none"`) fills in whatever the caller leaves out, so a saved
configuration is complete and does not change when a preset does.
"""

from huggingface_hub.dataclasses import strict
from transformers import GPT2Config

from ..errors import InputError, check_range
from .arguments import LinearAttentionOptions

# The measurements behind "default" are in docs/ablation.md. Its last slots are as many as MEMORY_COST buys: each one
# more helps, and the wider a model is, the less of its cost is attention.
MEMORY_COST = 0.02  # FLOPs of reading and writing memory, as a part of those of the window without it
POINTER_SLOTS = 4096  # as many as half of that pays for, if it pays for fewer
PRESETS = {
    "default": {"sink_slots": 1, "pooled_slots": 0},
    "yoshida2020": {"sink_slots": 0, "last_slots": 0, "pooled_slots": 1, "pointer_slots": 0},
    "none": {"sink_slots": 0, "last_slots": 0, "pooled_slots": 0, "pointer_slots": 0},
}


@strict
class RecurGPT2Config(GPT2Config):
    """Configuration of a GPT-2 that reads a document in windows.

    Args (beside those of `transformers.GPT2Config`):
        window: T, tokens a window. At least 2, at most `n_positions`.
        recurrence: name of the preset for the fields below that are left as None.
        insert_layers: layers at which a window attends to memory. "default": all of them.
        pool_layers: layers whose outputs are pooled into the memory of `insert_layers`, with a learned mix
            (Yoshida et al. 2020). Empty: each layer's memory is made from that same layer in the window before.
        sink_slots: learned slots that are the same for every document; they start as GPT-2's first position, on
            which pretrained heads rest when nothing else fits. Only without `pool_layers`.
        last_slots: slots that hold the last positions of the window before. Only without `pool_layers`. "default": as
            many as cost 2% of a window's FLOPs together with the other slots, at most a whole window.
        pooled_slots: slots that hold learned pooling over the window before, carried over with a gate
            (without `pool_layers`), or that the feed-forward net writes (with them).
        pointer_slots: N, positions of the document so far that the head may point at, to predict the tokens that
            followed them; "default": 4,096, or as many as cost 1% of a window's FLOPs.
        pointer_width: width of their keys. None: n_embd / 16, at least 8.
        recurrence_width: width of the feed-forward net's hidden layers, with `pool_layers`.
        position_offset: positions by which every window but a document's first is shifted, so that the memory's
            last positions can stand before the window's first one.
        linear_layers: layers with linear instead of softmax attention (T2R, Kasai et al. 2021): a list, "all", or
            "75%", where every fourth layer, counted from the top, keeps softmax. Empty: none. Saved as a list.
        feature_map: of these layers: "t2r", "hedgehog", "elu" or "rfa".
        feature_size: k, features of a head ("elu" has as many as the head is wide, whatever this says).
        near_tokens: w, nearest positions that linear layers attend to by softmax, under one sum with linear attention
            to those before (Zhang et al. 2024, "LoLCATs"). 0: linear attention alone, as in T2R.
        carry_linear_state: carry the sums (S, z) of linear layers over the border of two windows, decayed by a
            learned factor per head. Not with `pool_layers`.

    Raises:
        InputError: a value out of range, or fields that contradict each other.
    """

    model_type = "recur_gpt2"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "state"]  # noqa: RUF012 (transformers' Trainer asks)

    # No longest text: transformers would warn of one.
    attribute_map = {name: own for name, own in GPT2Config.attribute_map.items() if own != "n_positions"}  # noqa: RUF012

    window: int = 256
    recurrence: str = "default"
    insert_layers: list[int] | None = None
    pool_layers: list[int] | None = None
    sink_slots: int | None = None
    last_slots: int | None = None
    pooled_slots: int | None = None
    pointer_slots: int | None = None
    pointer_width: int | None = None
    recurrence_width: int = 200
    position_offset: int | None = None
    linear_layers: list[int] | str | None = None
    feature_map: str = LinearAttentionOptions.feature_map
    feature_size: int = LinearAttentionOptions.feature_size
    near_tokens: int = LinearAttentionOptions.near_tokens
    carry_linear_state: bool = LinearAttentionOptions.carry_linear_state

    def __post_init__(self, **kwargs):
        if self.recurrence not in PRESETS:
            raise InputError(f"recurrence={self.recurrence!r} is not known; use one of {', '.join(PRESETS)}")
        self._check_window()
        for field, value in PRESETS[self.recurrence].items():
            if getattr(self, field) is None:
                setattr(self, field, value)
        if self.pool_layers is None:
            self.pool_layers = [self.n_layer - 1] if self.recurrence == "yoshida2020" else []
        if self.insert_layers is None:
            self.insert_layers = self._default_insert_layers()
        if self.pointer_width is None:
            self.pointer_width = max(8, self.n_embd // 16)
        if self.pointer_slots is None:
            self.pointer_slots = self._affordable_pointer_slots()
        if self.last_slots is None:
            self.last_slots = self._affordable_slots()
        if self.position_offset is None:
            wanted = self.sink_slots + self.last_slots if self.last_slots else 0
            self.position_offset = min(wanted, self.n_positions - self.window)
        self._check_recurrence()
        self._resolve_linear_layers()
        super().__post_init__(**kwargs)

    @property
    def memory_slots(self) -> int:
        """M, keys and values that memory adds to each layer of `insert_layers`."""
        return self.sink_slots + self.pooled_slots + self.last_slots

    @property
    def is_recurrent(self) -> bool:
        """Whether anything crosses the border of two windows."""
        return bool(self.memory_slots or self.pointer_slots or self.carry_linear_state)

    @property
    def inner_width(self) -> int:
        """Width of the feed-forward nets' inner layer."""
        return self.n_inner or 4 * self.n_embd

    @property
    def plain_flops(self) -> int:
        """FLOPs of plain GPT-2 for one token of a window, LM head included, without memory."""
        layer = 2 * self.n_embd * (4 * self.n_embd + 2 * self.inner_width) + 4 * self.n_embd * self.window
        return self.n_layer * layer + 2 * self.n_embd * self.vocab_size

    @property
    def pointer_flops(self) -> int:
        """FLOPs of pointing for one token of a window that has all slots before it."""
        return self._pointer_flops(self.pointer_slots) if self.pointer_slots else 0

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in transformers. What was saved before there were pointers has none."""
        if config_dict.get("model_type") == cls.model_type:
            config_dict = {"pointer_slots": 0} | config_dict
        return super().from_dict(config_dict, **kwargs)

    def _pointer_flops(self, slots):
        return 2 * self.pointer_width * slots + 2 * self.n_embd * (2 * self.pointer_width + 1)

    def _affordable_pointer_slots(self):
        paid = (MEMORY_COST / 2 * self.plain_flops - self._pointer_flops(0)) / (2 * self.pointer_width)
        return max(self.window, min(int(paid), POINTER_SLOTS))

    def _default_insert_layers(self):
        if self.recurrence == "yoshida2020":
            return [self.n_layer // 2]
        slots = self.sink_slots + self.pooled_slots + (1 if self.last_slots is None else self.last_slots)
        return list(range(self.n_layer)) if slots else []

    def _affordable_slots(self):
        """Last positions that MEMORY_COST pays for beside the other slots, at most a window of them."""
        slot = 4 * self.n_embd * max(1, len(self.insert_layers))
        paid = MEMORY_COST * self.plain_flops - self.pointer_flops
        slots = int(paid / slot) - self.sink_slots - self.pooled_slots
        return max(1, min(slots, self.window))

    def _resolve_linear_layers(self):
        """Names of sets of layers -> lists; and what linear attention cannot be combined with."""
        every = list(range(self.n_layer))
        named = {"all": every, "75%": [layer for layer in every if (self.n_layer - layer) % 4]}
        layers = [] if self.linear_layers is None else self.linear_layers
        if isinstance(layers, str):
            if layers not in named:
                raise InputError(f'linear_layers={layers!r} is not known; use "all", "75%" or a list of layers')
            layers = named[layers]
        if sorted(set(layers) & set(every)) != sorted(layers):
            raise InputError(f"linear_layers={layers} must be distinct layers from 0 to {self.n_layer - 1}")
        self.linear_layers = sorted(layers)
        if not 0 <= self.near_tokens <= self.window:
            raise InputError(f"near_tokens={self.near_tokens} must be from 0 to window={self.window}")
        if self.near_tokens and not self.linear_layers:
            raise InputError(f"near_tokens={self.near_tokens} are of linear layers; name some in linear_layers")
        if self.carry_linear_state and not self.linear_layers:
            raise InputError("carry_linear_state=True carries sums of linear layers; name some in linear_layers")
        if self.carry_linear_state and self.pool_layers:
            raise InputError(
                f"carry_linear_state=True cannot be combined with pool_layers={self.pool_layers}; leave one of them out"
            )

    def _check_window(self):
        check_range(2, window=self.window)
        if self.window > self.n_positions:
            raise InputError(
                f"window={self.window} exceeds the model's {self.n_positions} positions; "
                f"use --window {self.n_positions} or less"
            )

    def _check_recurrence(self):
        for field in ("insert_layers", "pool_layers"):
            layers = getattr(self, field)
            wrong = [layer for layer in layers if not 0 <= layer < self.n_layer]
            if wrong or len(set(layers)) < len(layers):
                raise InputError(f"{field}={layers} must be distinct layers from 0 to {self.n_layer - 1}")
        check_range(0, sink_slots=self.sink_slots, last_slots=self.last_slots, pooled_slots=self.pooled_slots)
        if self.last_slots > self.window:
            raise InputError(f"last_slots={self.last_slots} exceeds window={self.window}; use {self.window} or less")
        if self.pool_layers and (self.sink_slots or self.last_slots):
            raise InputError(
                f"pool_layers={self.pool_layers} pools whole windows and cannot be combined with "
                f"sink_slots={self.sink_slots} or last_slots={self.last_slots}; set those to 0"
            )
        if self.pool_layers and not self.insert_layers:
            raise InputError(f"pool_layers={self.pool_layers} needs at least one layer in insert_layers")
        if self.pool_layers and not self.pooled_slots:
            raise InputError(f"pool_layers={self.pool_layers} writes into pooled_slots=0; use 1 or more")
        check_range(0, pointer_slots=self.pointer_slots)
        check_range(1, recurrence_width=self.recurrence_width, pointer_width=self.pointer_width)
        if not 0 <= self.position_offset <= self.n_positions - self.window:
            raise InputError(
                f"position_offset={self.position_offset} must be from 0 to n_positions - window = "
                f"{self.n_positions - self.window}"
            )


OWN_FIELDS = [name for name in RecurGPT2Config.__annotations__ if name != "model_type"]


def with_window(config: GPT2Config, window: int, **options) -> RecurGPT2Config:
    """The configuration that a GPT-2's becomes with a window and other fields of RecurGPT2Config."""
    fields = config.to_dict() | options | {"window": window}
    fields.pop("model_type")
    if "num_labels" in options:  # which their names would contradict
        fields.pop("id2label", None)
        fields.pop("label2id", None)
    return RecurGPT2Config(**fields)
