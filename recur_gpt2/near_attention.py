"""Softmax attention to the nearest places and linear attention to all before them, under one sum. Not for projections.

With s_ij = q_i . k_j / sqrt(d), w nearest places and a learned log factor g_i = u . q_i + c for each head,

    out_i = N_i / D_i,    N_i = sum_{i-w<j<=i} exp(s_ij) v_j + exp(g_i) sum_{j<=i-w} (phi(q_i) . phi(k_j)) v_j,

D_i the same without v (Zhang et al. 2024, "LoLCATs", whose factor is a constant). What later places need of earlier
ones is of fixed size still: the sums (S, z), and the keys and values of the w last places. Feature maps follow broad
attention well and attention to neighbours badly; docs/t2r.md has what this gains.

B rows, T queries, H heads, w places in front of them, k features, d = D / H, C queries a chunk, G = B H chunks.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from .feature_maps import FLOOR
from .linear_attention import LinearState, own_types, running_sums, started
from .recurrence import widen

NEVER = -1e30  # the score of a place that is not seen: finite, so that a query that sees nothing stays finite too


class FarGate(nn.Module):
    """g_i = u . q_i + c, by how much (in nats) each head's weights of far places are raised. Starts at zero.

    Attributes:
        near_tokens: w, places that are near.
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


def near_attention(
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
    """Causal attention as above, in chunks of w queries.

    Args:
        query: (B, H, T, d), times d^-1/2.
        key, value: (B, H, w + T, d), w places in front of the first query and its own.
        query_features: phi(q), (B, H, T, k).
        key_features: phi(k) of the first T of these places, (B, H, T, k); no query has others far from it.
        gate: g, (B, H, T, 1).
        state: (S, z) of all places before these, or None for zeros.
        mask: (B, w + T) bool, false where there is nothing; None for something everywhere.
        floor: least sum of far weights, before the factor; below it a query looks at near places alone.

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
    chunk = min(near, length)
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
        out = _chunk_attention(
            q, _spans(key, near, chunk), _spans(value, near, chunk), phi_q, phi_k, g, sums, norms, seen, floor
        )
    return rearrange(out, "(b h n) c d -> b h (n c) d", b=len(value), h=value.shape[1])[:, :, :length].to(dtype)


def _spans(tensor, near, chunk):
    """(B, H, w + N C, x) -> (B H N, w + C, x): what the queries of each chunk may see, one after another."""
    spans = tensor.unfold(2, near + chunk, chunk)  # (B, H, N, x, w + C)
    return rearrange(spans, "b h n x s -> (b h n) s x")


def _chunk_attention(q, k, v, phi_q, phi_k, g, sums, norms, seen, floor):
    """(G, C, .) queries over (G, w + C, .) places, of which those far from each have features (G, C, k)."""
    length, span = q.shape[1], k.shape[1]
    place = torch.arange(span, device=q.device) - torch.arange(length, device=q.device)[:, None]
    beyond = torch.zeros(length, span, dtype=q.dtype, device=q.device)
    beyond.masked_fill_((place <= 0) | (place > span - length), NEVER)
    scores = torch.baddbmm(beyond, q, k.mT)
    if seen is not None:
        scores = scores.masked_fill(~seen, NEVER)
    far = torch.bmm(phi_q, phi_k.mT).tril()
    total = far.sum(dim=2, keepdim=True, dtype=norms.dtype) + phi_q.to(norms.dtype) @ norms[..., None]
    nothing = total < floor
    with torch.no_grad():  # any number serves: it is in numerator and denominator
        top = (g + total.clamp_min(floor).log()).masked_fill(nothing, NEVER)
        top = torch.maximum(top, widen(scores.amax(dim=2, keepdim=True)))
    factor = (g - top).masked_fill(nothing, -torch.inf).exp()
    weights = (scores - top).exp()
    denominator = weights.sum(dim=2, keepdim=True) + factor * total
    weights = weights + nn.functional.pad(far * factor, (0, span - length))
    numerator = torch.bmm(weights.to(v.dtype), v).baddbmm(phi_q * factor.to(phi_q.dtype), sums)
    return numerator / denominator
