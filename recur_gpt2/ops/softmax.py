"""Softmax attention of one window, with memory keys and values in front. Not for projections, caches or positions.

B rows, T queries, H heads, M memory slots, d = D / H. One function has several kernels to choose from; which one is
fastest where was measured (docs/performance.md). All give the same result up to rounding.
"""

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as sdpa

KeyValue = tuple[Tensor, Tensor]
LONGEST_PRODUCTS = 1024  # window; a backward pass needs the weights of every layer, which longer ones have too many of
CHUNK_WEIGHTS = 2**21  # attention weights made at a time by plain products, so that they stay in a processor's cache
# Queries that a CPU takes at a time, with the keys that these may see alone: what lies in the future costs nothing.
QUERIES, QUERIES_WITHOUT_GRADIENT, QUERIES_IN_PRODUCTS = 128, 64, 128


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
    if query.device.type != "cpu":
        return sdpa(query, key, value, attn_mask=visible_positions(length, slots, some, query.device), **options)
    mask = _future(length, slots, query.dtype) if some is None else visible_positions(length, slots, some, query.device)
    step = QUERIES if torch.is_grad_enabled() else QUERIES_WITHOUT_GRADIENT
    return _in_steps(partial(sdpa, **options), query, key, value, mask, step)


def queries_in_products(length: int) -> int:
    """Queries of a window of `length` that products take at a time on a CPU. With them the number of keys grows, and
    oneDNN keeps a quarter of a megabyte of code for each: so at most four numbers of keys."""
    return min(length, max(QUERIES_IN_PRODUCTS, -(-length // 4)))


def partial_window_attention(
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
    positions = torch.tensor(filled)[:, None] + torch.arange(new)  # (B, n)
    visible = torch.arange(length) <= positions[..., None]  # (B, n, F)
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


def visible_positions(length, slots, some, device):
    """What a query may see: (T, M + T) bool, or (B, 1, T, M + T) where only `some` (B,) rows have memory."""
    visible = _all_visible(length, slots, device)
    return visible if some is None else visible & ~_unread(some, slots, length).to(device)[:, None, None]


def _products_pay(query):
    """In 16 bit a CPU multiplies matrices so fast that its fused attention kernel is up to four times slower."""
    return query.device.type == "cpu" and query.element_size() == 2 and query.shape[2] <= LONGEST_PRODUCTS


def _products(query, key, value, slots, some, scale, dropout):
    """Products and a softmax, some rows at a time."""
    rows, heads, length, _ = query.shape
    step = max(1, CHUNK_WEIGHTS // (heads * length * (slots + length)))
    unread = [None] * rows if some is None else _unread(some, slots, length).split(step)
    parts = zip(*(tensor.contiguous().split(step) for tensor in (query, key, value)), unread, strict=False)
    future = _future(length, slots, query.dtype)
    some_rows = []
    for *tensors, unread_slots in parts:
        kernel = partial(_some_products, unread=unread_slots, scale=scale, dropout=dropout)
        some_rows.append(_in_steps(kernel, *tensors, future, queries_in_products(length)))
    return torch.cat(some_rows)


def _some_products(query, key, value, bias, *, unread, scale, dropout):
    heads = query.shape[1]
    flat_query, flat_key, flat_value = (tensor.flatten(0, 1) for tensor in (query, key, value))
    weights = torch.baddbmm(bias, flat_query, flat_key.transpose(1, 2), alpha=scale)  # (B * H, T, M + T)
    if unread is not None:
        unread = unread[:, : key.shape[2]]
        nothing = torch.zeros(unread.shape, dtype=query.dtype).masked_fill_(unread, -torch.inf)
        weights.add_(nothing.repeat_interleave(heads, dim=0)[:, None])
    weights = torch.nn.functional.dropout(weights.softmax(dim=-1), dropout)
    return (weights @ flat_value).view(query.shape)


def _in_steps(kernel: Callable[..., Tensor], query, key, value, mask, step) -> Tensor:
    """Causal attention by a kernel that takes a mask (..., T, M + T): `step` queries at a time."""
    length, slots = query.shape[2], key.shape[2] - query.shape[2]
    parts = []
    for start in range(0, length, step):
        end = min(start + step, length)
        seen = slice(slots + end)
        queries, masked = query[:, :, start:end], mask[..., start:end, seen]
        parts.append(kernel(queries, key[:, :, seen], value[:, :, seen], masked).transpose(1, 2))
    return torch.cat(parts, dim=1).transpose(1, 2)  # in the order in which a layer joins its heads, without a copy
