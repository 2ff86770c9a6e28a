"""Softmax attention of one window, with memory keys and values in front. Not for projections, caches or positions.

B rows, T queries, H heads, M memory slots, d = D / H.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

KeyValue = tuple[Tensor, Tensor]


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

    Returns:
        (B, H, T, d)
    """
    if memory is None or not has_memory.any():
        return sdpa(query, key, value, is_causal=True, scale=scale, dropout_p=dropout)
    if has_memory.all():
        return _causal_with_memory(query, key, value, memory, scale, dropout)
    # Two groups of rows, each without a mask: the kernels for a mask are slower, and this stays exact.
    alone, reading = (rows.nonzero().squeeze(1).to(query.device) for rows in (~has_memory, has_memory))
    first = sdpa(query[alone], key[alone], value[alone], is_causal=True, scale=scale, dropout_p=dropout)
    memory = tuple(tensor[reading] for tensor in memory)
    later = _causal_with_memory(query[reading], key[reading], value[reading], memory, scale, dropout)
    order = torch.cat((alone, reading)).argsort()
    return torch.cat((first, later)).index_select(0, order)


def _causal_with_memory(query, key, value, memory, scale, dropout):
    """Every query sees all M slots and its own past.

    sdpa aligns a causal mask to the top left, so M rows of queries are put in front, and dropped afterwards: without
    them the slots would be visible to late queries only, or to none.
    """
    slots = memory[0].shape[2]
    padding = query.new_zeros(*query.shape[:2], slots, query.shape[3])
    query = torch.cat((padding, query), dim=2)
    key = torch.cat((memory[0].to(key.dtype), key), dim=2)
    value = torch.cat((memory[1].to(value.dtype), value), dim=2)
    return sdpa(query, key, value, is_causal=True, scale=scale, dropout_p=dropout)[:, :, slots:]


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
        memory, has_memory: as in `window_attention`.
        filled: (B,) int64 on the CPU, tokens that each row's window held before.

    Returns:
        (B, H, n, d)
    """
    new, length = query.shape[2], key.shape[2]
    reads = memory is not None and bool(has_memory.any())
    uniform = bool((filled == filled[0]).all()) and (not reads or bool(has_memory.all()))
    if reads:
        key = torch.cat((memory[0].to(key.dtype), key), dim=2)
        value = torch.cat((memory[1].to(value.dtype), value), dim=2)
    if uniform and new == 1 and int(filled[0]) + 1 == length:
        return sdpa(query, key, value, scale=scale, dropout_p=dropout)  # one new token: it sees everything
    places = filled[:, None] + torch.arange(new)  # (B, n)
    visible = torch.arange(length) <= places[..., None]  # (B, n, F)
    if reads:
        slots = memory[0].shape[2]
        visible = torch.cat((has_memory[:, None, None].expand(-1, new, slots), visible), dim=2)
    mask = visible[:, None].to(query.device)
    return sdpa(query, key, value, attn_mask=mask, scale=scale, dropout_p=dropout)
