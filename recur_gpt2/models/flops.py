"""What a model costs: FLOPs, counted from its configuration.

A FLOP is a multiplication or an addition inside a matrix product, as torch's FlopCounterMode counts them: softmax
attention counts for the whole rectangle of queries and keys, whether a kernel skips the future or not.
"""

from __future__ import annotations

from ..ops import hybrid
from ..ops.feature_maps import FEATURE_MAPS
from ..ops.linear import CHUNK
from .configuration import RecurGPT2Config


def flops_per_token(config: RecurGPT2Config, *, memory: bool = True, training: bool = False) -> float:
    """FLOPs for one token of a full window, LM head included.

    Args:
        memory: whether the window reads memory; False for the first window of a document, or for windows read
            apart. What pooled slots cost to write is counted in any case: every window writes them.
        training: forward and backward (three times the forward, and what linear attention computes again) rather
            than forward alone. Recomputation under checkpointing would add one more forward.
    """
    forward = config.plain_flops
    if config.pointer_slots:  # a window keys its positions, and asks, in any case
        forward += (
            config.pointer_flops if memory else config.pointer_flops - 2 * config.pointer_width * config.pointer_slots
        )
    for layer in range(config.n_layer):
        linear = layer in config.linear_layers
        if layer in config.insert_layers:
            reading = _reading_flops(config, linear=linear) if memory else 0
            forward += (_writing_flops(config) + reading) / config.window
        if linear:
            forward += _linear_flops(config) - 4 * config.n_embd * config.window
    return 3 * forward + len(config.linear_layers) * _recomputed_flops(config) if training else forward


def _linear_flops(config):
    """FLOPs of linear attention for one token: features, products inside a chunk, and sums from chunk to chunk."""
    if config.near_tokens:
        return _near_flops(config)
    head, features, matrix = head_features(config)
    chunk = min(CHUNK, config.window)
    carrying = 2 * features * head if config.carry_linear_state else 0  # of windows computed together
    each = 4 * head * matrix + 2 * chunk * (features + head) + 4 * features * head + carrying
    return config.n_head * each


def _near_flops(config):
    """The same of layers with `near_tokens`, where a chunk's queries meet w positions in front of it and its own."""
    head, features, matrix = head_features(config)
    near, window = config.near_tokens, config.window
    chunk = min(hybrid.CHUNK, near, window)
    chunked = -(-window // chunk) * chunk / window  # of the last chunk's queries, some are padding
    in_chunk = 4 * (near + chunk) * head + 2 * chunk * features + 4 * features * head + 2 * features
    carrying = (1 + near / window) * 2 * head * (matrix + features) if config.carry_linear_state else 0
    return config.n_head * (4 * head * matrix + 2 * head + chunked * in_chunk + carrying)


def _recomputed_flops(config):
    """FLOPs for one token of what linear attention's backward pass makes once more: the products inside a chunk."""
    if config.near_tokens:
        return 0
    return 2 * config.n_head * min(CHUNK, config.window) * head_features(config)[1]


def head_features(config: RecurGPT2Config) -> tuple[int, int, int]:
    """d, k and rows of a head's feature matrix."""
    head = config.n_embd // config.n_head
    return head, *FEATURE_MAPS[config.feature_map].sizes(head, config.feature_size)


def _reading_flops(config, *, linear):
    """FLOPs of one window in one insertion layer for the memory that it reads."""
    width, window, slots = config.n_embd, config.window, config.memory_slots
    attending = 4 * width * window * slots
    if linear:
        _, features, matrix = head_features(config)
        attending = 2 * width * max(0, slots - config.near_tokens) * (matrix + features)
    if not config.pool_layers:
        return attending
    hidden = config.recurrence_width
    net = 2 * (width * hidden + hidden * hidden + hidden * slots * width)  # run by every insertion layer
    return attending + net + 2 * width * 2 * width * slots


def _writing_flops(config):
    """FLOPs of one window in one insertion layer for the memory that it leaves. A mean or a slice costs none."""
    return 0 if config.pool_layers else config.pooled_slots * config.n_embd * (6 * config.window + 2)
