"""Normalised causal linear attention over features. Not for the feature maps, nor for the projections around them.

    out_i = phi(q_i) S_i / max(phi(q_i) . z_i, floor),    S_i = sum_{j<=i} phi(k_j) v_j^T,    z_i = sum_{j<=i} phi(k_j)

`naive` writes this down, `chunked` computes it fast, `step` does one token; `linear_attention` picks one of the latter
two. All take the features phi(q) and phi(k), and take and return the sums (S, z), which are all that later tokens need
of earlier ones. B rows, T tokens, H heads, k features, d = D / H, M slots, C tokens a chunk, N chunks, G = B H N.

A query that meets no key, because its own features or those of all keys are zero, gets zeros. On the way there, below
the floor, the output fades instead of being a mean of values: it stays continuous, its gradient finite.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..utils.tensors import widen
from .feature_maps import FLOOR

LinearState = tuple[Tensor, Tensor]  # S (B, H, k, d) and z (B, H, k), in float32 or wider
CHUNK = 64  # fastest in bfloat16; in float32 32 would gain a tenth (bench_linear_attention.py --chunks 32 64 128)


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: LinearState | None = None,
    *,
    mask: Tensor | None = None,
    floor: float = FLOOR,
) -> tuple[Tensor, LinearState]:
    """Causal linear attention, by the kernel that is fastest for the shapes at hand.

    Args:
        query, key: phi(q) and phi(k), (B, H, T, k).
        value: (B, H, T, d). The result is of its type, and in 16 bit so are the products inside a chunk.
        state: (S, z) before the first token, or None for zeros.
        mask: (B, T) bool, false at pads, which may stand anywhere and enter no sum; None for no pads. What a pad's own
            query gets means nothing.
        floor: least denominator.

    Returns:
        (B, H, T, d), and (S, z) after the last token.
    """
    # The place to dispatch from: another package's kernel for CUDA (flash-linear-attention's chunk_linear_attn takes
    # (B, T, H, ...), and has neither z nor a mask) would stand beside these two.
    kernel = step if value.shape[2] == 1 else chunked
    return kernel(query, key, value, state, mask=mask, floor=floor)


def naive(query, key, value, state=None, *, mask=None, floor=FLOOR):
    """The definition, quadratic in T and slow. Arguments and results are those of `linear_attention`."""
    dtype, (query, key, value) = value.dtype, map(widen, (query, key, value))
    key = without_pads(key, mask)
    sums, norms = started(state, key, value)
    with own_types(value):
        weights = (query @ key.mT).tril()
        numerator = weights @ value + query @ sums
        denominator = weights.sum(dim=-1, keepdim=True) + query @ norms[..., None]
        state = sums + key.mT @ value, norms + key.sum(dim=2)
    return (numerator / denominator.clamp_min(floor)).to(dtype), state


def step(query, key, value, state=None, *, mask=None, floor=FLOOR):
    """One token, T = 1. Arguments and results are those of `linear_attention`."""
    dtype, query = value.dtype, widen(query)
    sums, norms = absorb(key, value, state, mask=mask)
    with own_types(value):
        out = query @ sums / (query @ norms[..., None]).clamp_min(floor)
    return out.to(dtype), (sums, norms)


def chunked(query, key, value, state=None, *, mask=None, floor=FLOOR, chunk=CHUNK):
    """Quadratic inside chunks of `chunk` tokens, linear from chunk to chunk, and so in T.

    Arguments and results are those of `linear_attention`.
    """
    dtype, length = value.dtype, value.shape[2]
    if dtype == torch.float16:
        value = value.float()  # sums over a document leave float16's range
    query, key = query.to(value.dtype), without_pads(key.to(value.dtype), mask)
    chunk = min(chunk, length)
    missing = -length % chunk
    if missing:  # up to a whole chunk with keys of zeros, which enter no sum
        query, key, value = (torch.nn.functional.pad(each, (0, 0, 0, missing)) for each in (query, key, value))
    out, *state = _Chunked.apply(query, key, value, *started(state, key, value), floor, chunk)
    return out[:, :, :length].to(dtype), tuple(state)


def absorb(key: Tensor, value: Tensor, state: LinearState | None = None, *, mask: Tensor | None = None) -> LinearState:
    """Add keys and values to the sums: memory slots before a window's first token, which then cost nothing more.

    Args:
        key: phi(k), (B, H, M, k).
        value: (B, H, M, d).
        state: (S, z) so far, or None for zeros.
        mask: (B, M) bool, false for what is left out; (B, 1) for rows that have memory or have not.
    """
    key, value = without_pads(widen(key), mask), widen(value)
    sums, norms = started(state, key, value)
    with own_types(value):
        return sums + key.mT @ value, norms + key.sum(dim=2)


def without_pads(key: Tensor, mask: Tensor | None) -> Tensor:
    """phi(k) (B, H, T, k), zero where `mask` (B, T) is false: in neither sum."""
    return key if mask is None else key.masked_fill(~mask[:, None, :, None], 0)


def started(state, key, value):
    """The state in the type of its sums; zeros for None."""
    dtype = torch.promote_types(value.dtype, torch.float32)
    if state is not None:
        return tuple(each.to(dtype) for each in state)
    rows, heads, _, features = key.shape
    sums = torch.zeros(rows, heads, features, value.shape[3], dtype=dtype, device=key.device)
    return sums, sums.new_zeros(rows, heads, features)


def own_types(tensor):
    """Products in the types that they are given, under autocast too."""
    return torch.autocast(tensor.device.type, enabled=False)


class _Chunked(torch.autograd.Function):
    """The chunked form of whole chunks, with a backward pass of its own.

    Autograd would keep the (C, C) matrices of every chunk. This keeps the inputs, the output and each chunk's (S, z),
    recomputes the rest, and is a tenth to a fifth faster. g_i being the numerator's gradient, e_i the denominator's,

        dphi(q_i) = sum_{j<=i} w_ij phi(k_j),    dphi(k_j) = sum_{i>=j} w_ij phi(q_i),    w_ij = g_i . v_j + e_i,
        dv_j = sum_{i>=j} (phi(q_i) . phi(k_j)) g_i,

    again quadratic inside a chunk, and beyond it by sums over the chunks before (phi(q)) or after (phi(k), v).
    """

    @staticmethod
    def forward(ctx, query, key, value, sums, norms, floor, chunk):
        q, k, v = (rearrange(each, "b h (n c) x -> (b h n) c x", c=chunk) for each in (query, key, value))
        with own_types(q):
            sums, sums_after = _scan(sums, torch.bmm(k.mT, v), v.dtype)
            norms, norms_after = _scan(norms, k.sum(dim=1, dtype=norms.dtype), norms.dtype)
            weights = torch.bmm(q, k.mT).tril_()
            denominator = weights.sum(dim=2, keepdim=True, dtype=norms.dtype)
            denominator += (q * norms[:, None]).sum(dim=2, keepdim=True)
            out = torch.bmm(weights, v).baddbmm_(q, sums).div_(denominator.clamp_min(floor))
        ctx.save_for_backward(q, k, v, sums, norms, denominator, out)
        ctx.floor = floor
        return out.view(value.shape), sums_after, norms_after

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_sums, grad_norms):
        q, k, v, sums, norms, denominator, out = ctx.saved_tensors
        with own_types(q):
            g = (grad_out.reshape(v.shape) / denominator.clamp_min(ctx.floor)).to(v.dtype)
            e = (g * out).sum(dim=2, keepdim=True, dtype=norms.dtype).neg_().masked_fill_(denominator < ctx.floor, 0)
            grad_sums, grad_sums_before = _scan(grad_sums, torch.bmm(q.mT, g), v.dtype, reverse=True)
            grad_norms, grad_norms_before = _scan(grad_norms, (q * e).sum(dim=1), norms.dtype, reverse=True)
            w = torch.bmm(g, v.mT).add_(e).tril_()
            grad_q = torch.bmm(w, k).baddbmm_(g, sums.mT).add_(e * norms[:, None])
            grad_k = torch.bmm(w.mT, q).baddbmm_(v, grad_sums.mT).add_(grad_norms[:, None])
            weights = torch.bmm(q, k.mT).tril_()
            grad_v = torch.bmm(weights.mT, g).baddbmm_(k, grad_sums)
        grads = (each.view(*grad_out.shape[:3], -1) for each in (grad_q, grad_k, grad_v))
        return *grads, grad_sums_before, grad_norms_before, None, None


def running_sums(first: Tensor, updates: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums before each chunk, (G, ...) in `dtype`: `first` (B, H, ...) and what chunks before it add, (G, ...)."""
    return _RunningSums.apply(first, updates, dtype)


class _RunningSums(torch.autograd.Function):
    """`_scan`, which works in place, for autograd."""

    @staticmethod
    def forward(ctx, first, updates, dtype):
        ctx.first, ctx.dtype = (first.shape, first.dtype), updates.dtype
        return _scan(first, updates, dtype)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        shape, dtype = ctx.first
        after, total = _scan(grad.new_zeros(shape, dtype=dtype), grad, ctx.dtype, reverse=True)
        return total, after, None


def _scan(first, updates, dtype, *, reverse=False):
    """Running sums over chunks, from `first` (B, H, ...) on, of what each chunk adds, (G, ...).

    Returns:
        The sums before each chunk in `dtype`, (G, ...), and the sum of everything, (B, H, ...). With `reverse` the
        chunks come in the opposite order, so that "before" is after.
    """
    total, shape = first.flatten(0, 1), updates.shape
    updates = updates.unflatten(0, (len(total), -1))
    if updates.is_cuda or updates.ndim == 3:  # cumsum over matrices is several times slower than a loop on a CPU
        updates = torch.cat((total[:, None], updates.flip(1) if reverse else updates), dim=1).cumsum(dim=1)
        before, total = updates[:, :-1].to(dtype), updates[:, -1]
        before = before.flip(1) if reverse else before
    else:
        before, total = torch.empty_like(updates, dtype=dtype), total.clone()
        chunks = range(updates.shape[1])
        for chunk in reversed(chunks) if reverse else chunks:
            before[:, chunk] = total
            total += updates[:, chunk]
    return before.reshape(shape), total.view(first.shape)
