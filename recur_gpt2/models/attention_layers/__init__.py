"""The kinds of attention inside a layer: one class each, used alike by reading, by reading on and by decoding.

Each class has the same methods. `prefill` runs a block of windows at once; the others go on token by token in buffers
that are made once and written in place.

    prefill(hidden, windows, memory)    layer input (B, W, T, D) -> what its heads attend to (B, W, H, T, d), and what
                                        windows that are not full keep, {key of RecurState.window: tensors (B, W, ...)}
    allocate(rows, ...)                 make the buffers
    step(hidden, positions)             layer input (B, 1, D) of one token -> (B, H, 1, d)
    last_positions(rows), total(rows)   what the memory of full windows is written from
    begin(rows, memory, carried)        begin a new window in some rows
    save(filled), load(window, filled)  to and from RecurState.window

B rows, W windows, T tokens a window, D width, H heads, d = D / H.
"""

from ..block import RecurGPT2Block
from .hybrid import HybridAttention
from .linear import LinearAttention
from .softmax import AttentionHook, SoftmaxAttention

__all__ = ["AttentionHook", "HybridAttention", "LinearAttention", "SoftmaxAttention", "attention_of"]


def attention_of(
    block: RecurGPT2Block, hook: AttentionHook | None = None
) -> SoftmaxAttention | LinearAttention | HybridAttention:
    """The attention of a layer. With `hook` it is softmax, as before conversion, and the hook is shown what it does."""
    if block.feature_map is None or hook is not None:
        return SoftmaxAttention(block, hook)
    return (LinearAttention if block.far_gate is None else HybridAttention)(block)
