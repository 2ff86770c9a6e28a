"""Peak memory of a process that trains, scores, embeds or generates, as a formula of the configuration.

What PyTorch allocates is counted tensor by tensor; what the heap of glibc and the libraries take beside it is two
numbers, fitted to measurements (tests/test_memory.py compares both with fresh processes). For a CPU with the allocator
tuned; for a GPU, whose kernels keep less, it has not been measured.

D model width, T window, M memory slots, L layers, V vocabulary, P windows at once, K windows per segment. All in bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ..errors import InputError, check_range
from ..models.block import TOKENS_AT_ONCE
from ..models.configuration import RecurGPT2Config
from ..models.flops import head_features
from ..models.modeling import RecurGPT2LMHeadModel
from ..ops import hybrid
from ..ops.cross_entropy import CASTS, VOCABULARY_ROWS, cpu_chunk_rows
from ..ops.linear import CHUNK
from ..ops.pointer import CPU_SCORES
from ..ops.softmax import LONGEST_PRODUCTS, queries_in_products
from ..training.activation_checkpointing import KEPT, NOTED
from .tasks import TASKS

FLOAT, LOW = 4, 2
# Beside the tensors: buffers of the matrix libraries, and small objects.
LIBRARIES = {"train": 15 * 2**20, "accumulated": 25 * 2**20, "recomputed": 9 * 2**20, "read": 16 * 2**20}
THREAD = 7 * 2**20  # without gradients, too: each thread of PyTorch's but the first (measured with two)
# With recomputation, too: what oneDNN keeps for each shape of a product in 16 bit. Windows with memory have their own,
# and linear attention has: with it 29 MiB on an AMD processor, and some 55 on an Intel one with AMX.
KERNELS, MEMORY_KERNELS, LINEAR_KERNELS = 16 * 2**20, 29 * 2**20, 40 * 2**20
# glibc's heap over what lives in it. Tensors are aligned, so that the hole left by one does not fit its like: what is
# made and freed tears it.
HEAP = {"train": 1.25, "accumulated": 1.31, "recomputed": 1.18}
# Without gradients: over the layer at hand; over state, logits and hidden states; over weights in 16 bit.
LAYER_HEAP, CARRIED_HEAP, CAST_HEAP = 1.75, 1.5, 1.4


@dataclass(frozen=True)
class Workload:
    """What a process does with a model. Raises InputError where a value is out of range."""

    task: str = "train"
    """train, score, embed or generate."""
    lanes: int = 8
    """Documents read side by side."""
    windows: int = 4
    """K of a segment for train; P, windows of a document read at once, for score and embed."""
    checkpointing: bool = False
    """train: recompute windows one by one, and their layers."""
    precision: str = "float32"
    """"float32", or "bfloat16": autocast over float32 weights."""
    accumulate: int = 1
    """train: segments an optimizer step."""

    def __post_init__(self):
        if self.task not in TASKS:
            raise InputError(f"task={self.task!r} is not known; use one of {', '.join(TASKS)}")
        check_range(1, lanes=self.lanes, windows=self.windows, accumulate=self.accumulate)

    @property
    def width(self) -> int:
        """Bytes of a number in the products."""
        return LOW if self.precision == "bfloat16" else FLOAT


@dataclass(frozen=True)
class MemoryUse:
    """Predicted bytes, part by part; `total` is the peak above what the interpreter and its libraries take.

    Attributes:
        weights, gradients, optimizer: in float32, whole; gradients are counted where they stand at the peak.
        casts: the weights in 16 bit, under autocast.
        activations: kept for the backward pass, or the largest layer's where there is none.
        state: what is carried from window to window, with what is kept of it.
        logits: the chunk of them that exists at a time, its softmax and gradient, and the hidden states behind it.
        heap: what the allocator and the libraries take beside the tensors.
    """

    weights: int
    gradients: int
    optimizer: int
    casts: int
    activations: int
    state: int
    logits: int
    heap: int

    @property
    def fixed(self) -> int:
        """What no window, lane or attention changes."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return self.fixed + self.casts + self.activations + self.state + self.logits + self.heap


def memory_use(config: RecurGPT2Config, workload: Workload) -> MemoryUse:
    """The peak of one process, at whichever moment is the highest."""
    if workload.task == "train":
        return _training(config, workload)
    return _reading(config, workload)


def parameter_count(config: RecurGPT2Config) -> int:
    """Parameters, tied ones once."""
    return sum(_parameters(json.dumps(config.to_dict(), sort_keys=True, default=str)))


@lru_cache(maxsize=64)
def _parameters(fields):
    """Sizes of all parameters, from a model without weights."""
    with torch.device("meta"):
        model = RecurGPT2LMHeadModel(RecurGPT2Config(**json.loads(fields)))
    return [parameter.numel() for parameter in model.parameters()]


def _training(config, work):
    weights = FLOAT * parameter_count(config)
    head = FLOAT * config.vocab_size * config.n_embd
    if work.checkpointing:
        return _recomputed(config, work, weights)
    tokens = work.lanes * config.window * work.windows
    saved = tokens * sum(_saved(config, layer, work.width) for layer in range(config.n_layer))
    saved += tokens * _near_products(config, work.width)
    state = _state(config, work) * work.windows + _pointing(config, work, with_gradients=True)
    logits = _loss(config, work, tokens, with_gradients=True)
    casts = _casts(config, work)
    if work.accumulate > 1:  # gradients of the segments before are there when everything of one is saved
        return _with_heap("accumulated", weights, weights, 2 * weights, casts, saved, state, logits)
    # Either the loss, when everything is saved and of the gradients the head's alone is there; or the end of the
    # backward pass, when all are, and the embedding's stands beside the head's.
    at_loss = _with_heap("train", weights, head, 2 * weights, casts, saved, state, logits)
    at_end = _with_heap("train", weights, weights, 2 * weights, 0, head, state, tokens * config.n_embd * FLOAT)
    return max(at_loss, at_end, key=lambda use: use.total)


def _recomputed(config, work, weights):
    """All gradients stand throughout, and the outputs of layers that activation_checkpointing.py noted. Beside them
    either the loss of a window, or one layer's activations, with their gradients and its weights in 16 bit."""
    tokens, layers = work.lanes * config.window, range(config.n_layer)
    noted = min(NOTED, work.windows)
    pointer = _pointer_slots(config, work)
    state = (_state(config, work) + pointer) * (min(KEPT, work.windows) + 2 + noted)
    state += _pointing(config, replace(work, windows=1), with_gradients=True) - pointer
    state += tokens * config.n_layer * config.n_embd * FLOAT * noted
    layer = tokens * max(_saved(config, each, work.width) + _returning(config, each, work.width) for each in layers)
    logits, casts = _loss(config, work, tokens, with_gradients=True), _casts(config, work) // config.n_layer
    activations, logits, casts = (layer, 0, casts) if layer + casts > logits else (0, logits, 0)
    kernels = MEMORY_KERNELS if config.insert_layers else KERNELS
    kernels = LINEAR_KERNELS if config.linear_layers else kernels
    kernels = kernels if work.width == LOW else 0
    return _with_heap("recomputed", weights, weights, 2 * weights, casts, activations, state, logits, kernels)


def _reading(config, work):
    """What is passed on to the loss, or the layer at hand, whichever is more; in generating, or then the buffers."""
    weights, tokens = FLOAT * parameter_count(config), work.lanes * config.window * work.windows
    state, casts, moments = 2 * _state(config, work), _casts(config, work), []
    state += _pointing(config, work, with_gradients=False)
    if work.task == "generate":  # the weights themselves are in 16 bit, if so, after they were loaded
        moments.append(_without_gradients(weights, 0, buffers=weights // FLOAT * work.width if casts else 0))
        weights, casts = weights // FLOAT * work.width, 0
    layer = max(_passing(config, layer, work.width, tokens) for layer in range(config.n_layer))
    moments.append(_without_gradients(weights, casts, activations=layer, state=state))
    if work.task == "score":
        logits = _loss(config, work, tokens, with_gradients=False)
        moments.append(_without_gradients(weights, casts, state=state, logits=logits))
    if work.task == "generate":
        buffers = sum(_places(config, layer, work) for layer in range(config.n_layer))
        logits = 2 * FLOAT * work.lanes * config.vocab_size * (2 if config.pointer_slots else 1)
        moments.append(_without_gradients(weights, casts, state=state, logits=logits, buffers=buffers))
    return max(moments, key=lambda use: use.total)


def _without_gradients(weights, casts, *, activations=0, state=0, logits=0, buffers=0):
    """Weights and buffers are made once, and tear no heap."""
    libraries = LIBRARIES["read"] + THREAD * (torch.get_num_threads() - 1)
    heap = libraries + (CAST_HEAP - 1) * casts
    heap += (LAYER_HEAP - 1) * activations + (CARRIED_HEAP - 1) * (state + logits)
    return MemoryUse(weights, 0, 0, casts, round(activations), round(state + buffers), round(logits), round(heap))


def _with_heap(kind, weights, gradients, optimizer, casts, activations, state, logits, kernels=0):
    passing = casts + activations + state + logits
    passing += gradients if kind != "recomputed" else 0  # there they are made at once
    heap = round(LIBRARIES[kind] + kernels + (HEAP[kind] - 1) * passing)
    return MemoryUse(weights, gradients, optimizer, casts, round(activations), round(state), round(logits), heap)


def _casts(config, work):
    """Weights of all layers' matrix products in 16 bit: autocast keeps them as long as a graph does."""
    if work.precision != "bfloat16":
        return 0
    return LOW * config.n_layer * config.n_embd * (4 * config.n_embd + 2 * config.inner_width)


def _state(config, work):
    """What is carried over one border of windows, for all lanes, in the products' type."""
    if config.pool_layers:
        return FLOAT * work.lanes * len(config.pool_layers) * config.n_embd
    slots = config.last_slots + config.pooled_slots
    sums = len(config.linear_layers) * (config.feature_size * config.n_embd) if config.carry_linear_state else 0
    return work.lanes * (2 * work.width * len(config.insert_layers) * config.n_embd * slots + FLOAT * sums)


def _pointer_slots(config, work):
    """Of all lanes, which are carried and never in 16 bit."""
    return FLOAT * work.lanes * config.pointer_slots * (config.pointer_width + 1)


def _pointing(config, work, *, with_gradients):
    """Slots before a block and with its own behind them, its queries, and the scores at hand; with gradients those of
    slots, once for all windows and once for one of them."""
    if not config.pointer_slots:
        return 0
    slots, tokens = _pointer_slots(config, work), work.lanes * work.windows * config.window
    own = FLOAT * tokens * (config.pointer_width + 1)
    at_hand = 0 if work.task == "embed" else FLOAT * min(CPU_SCORES, config.window * config.pointer_slots)
    return (4 if with_gradients else 2) * slots + (8 if with_gradients else 3) * own + at_hand


def _places(config, layer, work):
    """What a layer keeps from token to token as text is written, in buffers (attention_layers/)."""
    slots = config.memory_slots if layer in config.insert_layers else 0
    positions = config.window + slots
    if layer in config.linear_layers:
        positions = config.near_tokens + config.window if config.near_tokens else config.last_slots
    sums = config.feature_size * config.n_embd if layer in config.linear_layers else 0
    return work.lanes * (2 * work.width * positions * config.n_embd + FLOAT * sums)


def _loss(config, work, tokens, *, with_gradients):
    """The chunk of logits at hand, what part of the head is in 16 bit, and the hidden states with their gradient."""
    rows = min(cpu_chunk_rows(config.vocab_size), tokens)
    hidden = FLOAT + (work.width + 2 * FLOAT if with_gradients else work.width)
    head = 0
    if work.width == LOW:
        parts = min(config.vocab_size, VOCABULARY_ROWS)
        head = LOW * config.n_embd * (config.vocab_size if tokens > CASTS * rows else parts)
        head += 2 * LOW * parts * (config.n_embd if with_gradients else rows)
    return rows * config.vocab_size * FLOAT + head + tokens * config.n_embd * hidden


def _passing(config, layer, width, tokens):
    """Bytes of the layer at hand, without gradients: what goes in and, while it attends, its norm, queries, keys and
    values, what they attend to; or both sides of the activation, for some tokens."""
    inner, wide = config.inner_width, config.n_embd
    attention = tokens * (2 * wide * FLOAT + wide * width + _attending(config, layer, width))
    return max(attention, 3 * wide * FLOAT * tokens + 2 * inner * width * min(tokens, TOKENS_AT_ONCE))


def _attending(config, layer, width):
    """Bytes a token of queries, keys and values; with memory keys and values once more, behind its slots, and the
    norm is gone by then; and attention weights where there are such."""
    if layer in config.linear_layers:
        # What the backward pass would need, less queries, keys, values and features before they are in chunks.
        _, features, _ = head_features(config)
        before = 4 * config.n_embd + 2 * config.n_head * features if config.near_tokens else 3 * config.n_embd
        return _linear(config, layer, width) - before * width
    window, wide = config.window, config.n_embd
    slots = config.memory_slots if layer in config.insert_layers else 0
    again = wide * (2 * (slots + window) / window - 1) if slots else 0
    return width * (3 * wide + again) + _weights_at_hand(config, slots, width)


def _weights_at_hand(config, slots, width):
    """Bytes a token of attention weights: short windows in 16 bit have them as products."""
    window = config.window
    if width != LOW or window > LONGEST_PRODUCTS:
        return 0
    return width * config.n_head * (slots + (window + queries_in_products(window)) / 2)


def _saved(config, layer, width):
    """Bytes a token that a layer keeps for the backward pass."""
    inner, wide = config.inner_width, config.n_embd
    # Both sides of the activation; two residuals; both norms' outputs, as the products take them; joined heads.
    shared = 2 * inner * width + 2 * wide * FLOAT + 2 * wide * width + wide * width
    return shared + _attention(config, layer, width)


def _attention(config, layer, width):
    """Of the attention alone."""
    return (_linear if layer in config.linear_layers else _softmax)(config, layer, width)


def _returning(config, layer, width):
    """Bytes a token of the gradients of a layer at hand: both sides of the activation, residuals, attention weights."""
    inner, window, step = config.inner_width, config.window, queries_in_products(config.window)
    weights = _near_products(config, width) if layer in config.linear_layers else 0
    if width == LOW and layer not in config.linear_layers:
        weights = 2 * width * config.n_head * (config.memory_slots + (window + step) / 2)
    return 2 * inner * width + 2 * config.n_embd * FLOAT + weights


def _softmax(config, layer, width):
    """Of softmax attention: queries, keys, values; with memory once more, behind its slots."""
    window, wide = config.window, config.n_embd
    slots = config.memory_slots if layer in config.insert_layers else 0
    along = (slots + window) / window
    if weights := _weights_at_hand(config, slots, width):
        return width * (wide + 2 * wide * along) + weights
    return width * (3 * wide + (wide + 2 * wide * along if slots else 0))


def _near_products(config, width):
    """Bytes a token of what a layer with near positions makes anew in its backward pass: weights of near and of far
    positions, and their gradients."""
    if not config.near_tokens:
        return 0
    chunk = min(hybrid.CHUNK, config.near_tokens, config.window)
    return 4 * width * config.n_head * (config.near_tokens + chunk)


def _linear(config, layer, width):
    """Of linear attention: queries, keys and values, features of both, each chunk's sums."""
    wide, heads = config.n_embd, config.n_head
    head, features, _ = head_features(config)
    maps = 2 * heads * head * features / config.window
    if config.near_tokens:
        chunk = min(hybrid.CHUNK, config.near_tokens, config.window)
        positions = 2 * wide * (config.near_tokens + chunk) / chunk
        if config.memory_slots:  # they stand in front of a window, with what the next one's are made of
            positions += 2 * wide * (max(config.near_tokens, config.last_slots) + config.window) / config.window
        return width * (positions + 7 * wide + 5 * heads * features + wide * features / chunk + maps)
    chunk = min(CHUNK, config.window)
    return width * (4 * wide + 2 * heads * features + wide * features / chunk + maps)
