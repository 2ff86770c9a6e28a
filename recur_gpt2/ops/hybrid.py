"""The sliding-window hybrid: softmax attention to the nearest positions, linear to all before them, under one sum.

With s_ij = q_i . k_j / sqrt(d), w nearest positions and a learned log factor g_i = u . q_i + c for each head,

    out_i = N_i / D_i,    N_i = sum_{i-w<j<=i} exp(s_ij) v_j + exp(g_i) sum_{j<=i-w} (phi(q_i) . phi(k_j)) v_j,

D_i the same without v (Zhang et al. 2024, "LoLCATs", whose factor is a constant). What later positions need of earlier
ones is of fixed size still: the sums (S, z), and the keys and values of the w last positions. Feature maps follow broad
attention well and attention to neighbours badly; docs/t2r.md has what this gains.

B rows, T queries, H heads, w positions in front of them, k features, d = D / H, C queries a chunk, G = B H chunks.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..utils.tensors import widen
from .feature_maps import FLOOR
from .linear import LinearState, own_types, running_sums, started

CHUNK = 32  # most queries a chunk: measured at w = 32, 64 and 128 (bench_linear_attention.py)
NEVER = -1e30  # the score of a position that is not seen: finite, so that a query that sees nothing stays finite too


class MixingGate(nn.Module):
    """g_i = u . q_i + c, by how much (in nats) each head's weights of far positions are raised. Starts at zero.

    Attributes:
        near_tokens: w, positions that are near.
    """

    def __init__(self, heads: int, width: int, near_tokens: int):
        super().__init__()
        self.near_tokens = near_tokens
        self.weight = nn.Parameter(torch.empty(heads, width))
        self.bias = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        self.weight.zero_()
        self.bias.zero_()

    def forward(self, query: Tensor) -> Tensor:
        """Queries times d^-1/2, (..., H, T, d) -> (..., H, T, 1), in float32 or wider."""
        gate = query @ self.weight[..., None].to(query.dtype)
        return widen(gate) + self.bias[:, None, None]


def hybrid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_features: Tensor,
    key_features: Tensor,
    gate: Tensor,
    state: LinearState | None = None,
    *,
    mask: Tensor | None = None,
    floor: float = FLOOR,
) -> Tensor:
    """Causal attention as above, in chunks of at most w queries.

    Args:
        query: (B, H, T, d), times d^-1/2.
        key, value: (B, H, w + T, d), w positions in front of the first query and its own.
        query_features: phi(q), (B, H, T, k).
        key_features: phi(k) of the first T of these positions, (B, H, T, k); no query has others far from it.
        gate: g, (B, H, T, 1).
        state: (S, z) of all positions before these, or None for zeros.
        mask: (B, w + T) bool, false where there is nothing; None for something everywhere.
        floor: least sum of far weights, before the factor; below it a query looks at near positions alone.

    Returns:
        (B, H, T, d), of the type of `value`. A query that sees nothing gets some finite numbers.
    """
    dtype, length, near = value.dtype, query.shape[2], value.shape[2] - query.shape[2]
    if dtype == torch.float16:
        value = value.float()  # sums over a document leave float16's range
    query, key, query_features, key_features = (
        each.to(value.dtype) for each in (query, key, query_features, key_features)
    )
    if mask is not None:
        key_features = key_features.masked_fill(~mask[:, None, :length, None], 0)
    chunk = min(CHUNK, near, length)
    missing = -length % chunk
    if missing:
        query, key, value, query_features, key_features, gate = (
            nn.functional.pad(each, (0, 0, 0, missing))
            for each in (query, key, value, query_features, key_features, gate)
        )
        mask = None if mask is None else nn.functional.pad(mask, (0, missing))
    far_value = value[:, :, : length + missing]
    with own_types(value):
        q, phi_q, phi_k, g, v = (
            rearrange(each, "b h (n c) x -> (b h n) c x", c=chunk)
            for each in (query, query_features, key_features, gate, far_value)
        )
        sums, norms = started(state, key_features, value)
        sums = running_sums(sums, torch.bmm(phi_k.mT, v), v.dtype)
        norms = running_sums(norms, phi_k.sum(dim=1, dtype=norms.dtype), norms.dtype)
        seen = None if mask is None else _spans(mask[:, None, :, None].expand(-1, key.shape[1], -1, -1), near, chunk).mT
        out = _NearChunks.apply(
            q, _spans(key, near, chunk), _spans(value, near, chunk), phi_q, phi_k, g, sums, norms, seen, floor
        )
    return rearrange(out, "(b h n) c d -> b h (n c) d", b=len(value), h=value.shape[1])[:, :, :length].to(dtype)


def _spans(tensor, near, chunk):
    """(B, H, w + N C, x) -> (B H N, w + C, x): what the queries of each chunk may see, one after another."""
    spans = tensor.unfold(2, near + chunk, chunk)  # (B, H, N, x, w + C)
    return rearrange(spans, "b h n x s -> (b h n) s x")


class _NearChunks(torch.autograd.Function):
    """(G, C, .) queries over (G, w + C, .) positions, of which those that can be far have features (G, C, k).

    Autograd would keep half a dozen (C, w + C) matrices of every chunk. With the numerator's gradient n_i and the
    denominator's e_i, and W_ij what position j weighs,

        dW_ij = n_i . v_j + e_i,    dv_j = sum_i W_ij n_i,    ds_ij = W_ij dW_ij  of near positions,

    and far ones pass exp(g_i) dW_ij on to phi(q_i) . phi(k_j). Weights are kept relative to the largest of a query.
    """

    @staticmethod
    def forward(ctx, q, k, v, phi_q, phi_k, g, sums, norms, seen, floor):
        with own_types(q):
            scores, far = _scores(q, k, seen), torch.bmm(phi_q, phi_k.mT).tril_()
            total = far.sum(dim=2, keepdim=True, dtype=norms.dtype)
            total += phi_q.to(norms.dtype) @ norms[..., None]
            nothing = total < floor
            top = (g + total.clamp_min(floor).log_()).masked_fill_(nothing, NEVER)
            top = torch.maximum(top, scores.amax(dim=2, keepdim=True).to(top.dtype)).to(q.dtype)
            factor = (g - top).masked_fill_(nothing, -torch.inf).exp_()
            weights = scores.sub_(top).exp_()
            denominator = (factor * total).add_(weights.sum(dim=2, keepdim=True, dtype=norms.dtype))
            narrow = factor.to(q.dtype)
            weights[:, :, : q.shape[1]].add_(far.mul_(narrow))
            out = torch.bmm(weights, v).baddbmm_(phi_q * narrow, sums).div_(denominator)
        ctx.save_for_backward(q, k, v, phi_q, phi_k, sums, norms, seen, top, factor, denominator, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, phi_q, phi_k, sums, norms, seen, top, factor, denominator, out = ctx.saved_tensors
        length, narrow = q.shape[1], factor.to(q.dtype)
        with own_types(q):
            n = (grad / denominator).to(v.dtype)
            e = (n * out).sum(dim=2, keepdim=True, dtype=norms.dtype).neg_()
            grad_weights = torch.bmm(n, v.mT).add_(e)
            weights = _scores(q, k, seen).sub_(top).exp_()
            grad_scores = weights * grad_weights
            grad_q, grad_k = torch.bmm(grad_scores, k), torch.bmm(grad_scores.mT, q)
            far = torch.bmm(phi_q, phi_k.mT).tril_()
            grad_far = grad_weights[:, :, :length]
            grad_sum = torch.bmm(n, sums.mT).add_(e * norms[:, None])
            grad_factor = (far * grad_far).sum(dim=2, keepdim=True, dtype=norms.dtype)
            grad_factor += (grad_sum * phi_q).sum(dim=2, keepdim=True, dtype=norms.dtype)
            grad_far = (grad_far * narrow).tril_()
            grad_phi_q = torch.bmm(grad_far, phi_k).add_(grad_sum * narrow)
            grad_phi_k = torch.bmm(grad_far.mT, phi_q)
            scaled = phi_q * narrow
            grad_sums = torch.bmm(scaled.mT, n)
            grad_norms = (scaled * e).sum(dim=1, dtype=norms.dtype)
            weights[:, :, :length].add_(far.mul_(narrow))
            grad_v = torch.bmm(weights.mT, n)
        return grad_q, grad_k, grad_v, grad_phi_q, grad_phi_k, grad_factor * factor, grad_sums, grad_norms, None, None


def _scores(q, k, seen):
    """(G, C, w + C) products of queries with near positions, NEVER elsewhere."""
    length, span = q.shape[1], k.shape[1]
    position = torch.arange(span, device=q.device) - torch.arange(length, device=q.device)[:, None]
    beyond = torch.zeros(length, span, dtype=q.dtype, device=q.device)
    beyond.masked_fill_((position <= 0) | (position > span - length), NEVER)
    scores = torch.baddbmm(beyond, q, k.mT)
    return scores if seen is None else scores.masked_fill_(~seen, NEVER)
