"""Softmax attention of one window, with memory keys and values in front. Not for projections, caches or positions.

B rows, T queries, H heads, M memory slots, d = D / H. One function has several kernels to choose from; which one is
fastest where was measured (docs/performance.md). All give the same result up to rounding.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as sdpa

KeyValue = tuple[Tensor, Tensor]
LONG_WINDOW = 512  # from here on skipping what lies in the future pays for more than it costs


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory: KeyValue | None,
    has_memory: Tensor,
    *,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention of windows read from their first token on.

    Args:
        query, key, value: (B, H, T, d).
        memory: keys and values (B, H, M, d), or None for none.
        has_memory: (B,) bool on the CPU; a row without memory attends to its own window alone.
        scale: factor of the products of queries and keys.
        dropout: of the attention weights.

    Returns:
        (B, H, T, d)
    """
    length = query.shape[2]
    if memory is None or not bool(has_memory.any()):
        slots, everywhere = 0, True
    else:
        slots, everywhere = memory[0].shape[2], bool(has_memory.all())
        key, value = _prepend(memory, key, value)
    if _products_pay(query):
        visible = _visible(length, slots, None if everywhere else has_memory, query.device)
        return _masked_products(query, key, value, visible, scale, dropout)
    options = {"scale": scale, "dropout_p": dropout}
    if not slots:
        return sdpa(query, key, value, is_causal=True, **options)
    if everywhere and query.is_cuda:
        return sdpa(query, key, value, attn_mask=causal_lower_right(length, slots + length), **options)
    if everywhere and length > LONG_WINDOW:
        return _causal_from_the_top(query, key, value, slots, **options)
    visible = _visible(length, slots, None if everywhere else has_memory, query.device)
    return sdpa(query, key, value, attn_mask=visible, **options)


def resumed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory: KeyValue | None,
    has_memory: Tensor,
    filled: Tensor,
    *,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention of tokens that continue windows, each row from a place of its own.

    Args:
        query: (B, H, n, d), the new tokens.
        key, value: (B, H, F, d), the window so far with the new tokens in it; row b's new tokens stand at
            `filled[b]` and after.
        filled: (B,) int64 on the CPU, tokens that each row's window held before.
        The other arguments are those of `window_attention`.

    Returns:
        (B, H, n, d)
    """
    new, length = query.shape[2], key.shape[2]
    reads = memory is not None and bool(has_memory.any())
    uniform = bool((filled == filled[0]).all()) and (not reads or bool(has_memory.all()))
    if reads:
        key, value = _prepend(memory, key, value)
    if uniform and new == 1 and int(filled[0]) + 1 == length:
        return sdpa(query, key, value, scale=scale, dropout_p=dropout)  # one new token: it sees everything
    places = filled[:, None] + torch.arange(new)  # (B, n)
    visible = torch.arange(length) <= places[..., None]  # (B, n, F)
    if reads:
        slots = memory[0].shape[2]
        visible = torch.cat((has_memory[:, None, None].expand(-1, new, slots), visible), dim=2)
    return sdpa(query, key, value, attn_mask=visible[:, None].to(query.device), scale=scale, dropout_p=dropout)


def _prepend(memory, key, value):
    return tuple(torch.cat((old.to(new.dtype), new), dim=2) for old, new in zip(memory, (key, value), strict=True))


@lru_cache(maxsize=16)
def _all_visible(length, slots, device):
    return torch.ones(length, slots + length, dtype=torch.bool, device=device).tril(slots)


def _visible(length, slots, has_memory, device):
    """What a query may see: (T, M + T) bool, or (B, 1, T, M + T) where only some rows have memory."""
    visible = _all_visible(length, slots, device)
    if has_memory is None:
        return visible
    is_slot = torch.arange(slots + length, device=device) < slots
    return visible & (has_memory.to(device)[:, None, None, None] | ~is_slot)


def _products_pay(query):
    """In 16 bit a CPU multiplies matrices so fast that its fused attention kernel is two to five times slower."""
    return query.device.type == "cpu" and query.element_size() == 2 and query.shape[2] <= LONG_WINDOW


def _masked_products(query, key, value, visible, scale, dropout):
    bias = torch.zeros(visible.shape, dtype=query.dtype).masked_fill_(~visible, -torch.inf)
    weights = (query * scale @ key.transpose(-1, -2)).add_(bias).softmax(dim=-1)
    return torch.nn.functional.dropout(weights, dropout) @ value


def _causal_from_the_top(query, key, value, slots, **options):
    """sdpa aligns a causal mask to the top left: M rows of queries in front make the slots visible to all others."""
    padding = query.new_zeros(*query.shape[:2], slots, query.shape[3])
    return sdpa(torch.cat((padding, query), dim=2), key, value, is_causal=True, **options)[:, :, slots:]
