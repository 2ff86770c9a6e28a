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
CHUNK_WEIGHTS = 2**21  # attention weights made at a time by plain products, so that they stay in a processor's cache


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory: KeyValue | None,
    has_memory: bool | Tensor,
    *,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention of windows read from their first token on.

    Args:
        query, key, value: (B, H, T, d).
        memory: keys and values (B, H, M, d), or None for none.
        has_memory: True, False or, where rows differ, (B,) bool; a row without memory attends to its own window alone.
        scale: factor of the products of queries and keys.
        dropout: of the attention weights.

    Returns:
        (B, H, T, d)
    """
    length = query.shape[2]
    slots = 0
    if memory is not None and has_memory is not False:
        slots = memory[0].shape[2]
        key, value = _prepend(memory, key, value)
    some = has_memory if slots and has_memory is not True else None
    if _products_pay(query):
        return _products(query, key, value, slots, some, scale, dropout)
    options = {"scale": scale, "dropout_p": dropout}
    if not slots:
        return sdpa(query, key, value, is_causal=True, **options)
    if some is None and query.is_cuda:
        return sdpa(query, key, value, attn_mask=causal_lower_right(length, slots + length), **options)
    if some is None and length > LONG_WINDOW:
        return _causal_from_the_top(query, key, value, slots, **options)
    return sdpa(query, key, value, attn_mask=visible_places(length, slots, some, query.device), **options)


def resumed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory: KeyValue | None,
    has_memory: bool | Tensor,
    filled: list[int],
    *,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention of tokens that continue windows, each row from a place of its own.

    Args:
        query: (B, H, n, d), the new tokens.
        key, value: (B, H, F, d), the window so far with the new tokens in it; row b's new tokens stand at
            `filled[b]` and after.
        filled: B numbers, tokens that each row's window held before.
        The other arguments are those of `window_attention`.

    Returns:
        (B, H, n, d)
    """
    new, length = query.shape[2], key.shape[2]
    reads = memory is not None and has_memory is not False
    if reads:
        key, value = _prepend(memory, key, value)
    alike = min(filled) == max(filled) and (not reads or has_memory is True)
    if alike and new == 1 and filled[0] + 1 == length:
        return sdpa(query, key, value, scale=scale, dropout_p=dropout)  # one new token: it sees everything
    places = torch.tensor(filled)[:, None] + torch.arange(new)  # (B, n)
    visible = torch.arange(length) <= places[..., None]  # (B, n, F)
    if reads:
        slots = torch.as_tensor(has_memory).expand(len(filled))[:, None, None].expand(-1, new, memory[0].shape[2])
        visible = torch.cat((slots, visible), dim=2)
    return sdpa(query, key, value, attn_mask=visible[:, None].to(query.device), scale=scale, dropout_p=dropout)


def _prepend(memory, key, value):
    return tuple(torch.cat((old.to(new.dtype), new), dim=2) for old, new in zip(memory, (key, value), strict=True))


@lru_cache(maxsize=16)
def _all_visible(length, slots, device):
    with torch.inference_mode(False):  # kept, and so used by whoever comes next: a backward pass may be among them
        return torch.ones(length, slots + length, dtype=torch.bool, device=device).tril(slots)


@lru_cache(maxsize=16)
def _future(length, slots, dtype):
    """What to add to the products of queries and keys: (T, M + T), zero where a query may look, else minus infinity."""
    with torch.inference_mode(False):
        return torch.zeros(length, slots + length, dtype=dtype).masked_fill_(
            ~_all_visible(length, slots, torch.device("cpu")), -torch.inf
        )


def _unread(has_memory, slots, length):
    """(B, M + T) bool: the slots of rows that have no memory."""
    return ~has_memory[:, None] & (torch.arange(slots + length) < slots)


def visible_places(length, slots, some, device):
    """What a query may see: (T, M + T) bool, or (B, 1, T, M + T) where only `some` (B,) rows have memory."""
    visible = _all_visible(length, slots, device)
    return visible if some is None else visible & ~_unread(some, slots, length).to(device)[:, None, None]


def _products_pay(query):
    """In 16 bit a CPU multiplies matrices so fast that its fused attention kernel is two to five times slower.

    Where gradients are wanted they need the weights of every layer, which long windows have too many of.
    """
    longest = LONG_WINDOW if torch.is_grad_enabled() else 2 * LONG_WINDOW
    return query.device.type == "cpu" and query.element_size() == 2 and query.shape[2] <= longest


def _products(query, key, value, slots, some, scale, dropout):
    """Products and a softmax, some rows at a time."""
    rows, heads, length, _ = query.shape
    step = max(1, CHUNK_WEIGHTS // (heads * length * (slots + length)))
    unread = [None] * rows if some is None else _unread(some, slots, length).split(step)
    parts = zip(*(tensor.split(step) for tensor in (query, key, value)), unread, strict=False)
    return torch.cat([_some_products(*part, slots, scale, dropout) for part in parts])


def _some_products(query, key, value, unread, slots, scale, dropout):
    heads = query.shape[1]
    bias = _future(query.shape[2], slots, query.dtype)
    flat_query, flat_key, flat_value = (tensor.flatten(0, 1) for tensor in (query, key, value))
    weights = torch.baddbmm(bias, flat_query, flat_key.transpose(1, 2), alpha=scale)  # (B * H, T, M + T)
    if unread is not None:
        nothing = torch.zeros(unread.shape, dtype=query.dtype).masked_fill_(unread, -torch.inf)
        weights.add_(nothing.repeat_interleave(heads, dim=0)[:, None])
    weights = torch.nn.functional.dropout(weights.softmax(dim=-1), dropout)
    return (weights @ flat_value).view(query.shape)


def _causal_from_the_top(query, key, value, slots, **options):
    """sdpa aligns a causal mask to the top left: M rows of queries in front make the slots visible to all others."""
    padding = query.new_zeros(*query.shape[:2], slots, query.shape[3])
    return sdpa(torch.cat((padding, query), dim=2), key, value, is_causal=True, **options)[:, :, slots:]
