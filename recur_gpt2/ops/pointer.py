"""A pointer sentinel mixture (Merity et al. 2017) over slots that each hold a key and a token.

A position's query is compared with all slots' keys, and with a sentinel: softmax gives the sentinel's share to the
model's own prediction, and every other share to the token in its slot. R rows, n positions, S slots, w width of keys, V
vocabulary.

A slot is (w + 1,) numbers: its key, and the id of its token plus one; all zeros, it is empty and takes no share.
Keys and queries are such that no score is above `ceiling`, which is subtracted before exponentials are taken.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..utils.tensors import in_full, widen

CPU_SCORES, GPU_SCORES = 2**19, 2**26  # scores that exist at a time: few large kernels, and on a CPU in its cache
NOTHING = -1e30  # an exponent whose power is zero


def pointer_shares(
    query: Tensor, sentinel: Tensor, slots: Tensor, targets: Tensor, ceiling: Tensor
) -> tuple[Tensor, Tensor]:
    """What the mixture gives to the model and, by pointing, to each position's target.

    Differentiable in all but targets. The scores are made once more in the backward pass: all of them would outweigh
    everything else.

    Args:
        query: (R, n, w).
        sentinel: (R, n) scores.
        slots: (R, S, w + 1).
        targets: (R, n) int64 ids; negative where nothing is scored.
        ceiling: () at least the largest score; no gradient goes through it.

    Returns:
        The log of the model's share, and the share that points at the target, (R, n) each.
    """
    with in_full(query.device):
        return _Shares.apply(query, sentinel, slots, targets, ceiling.detach())


def pointer_logits(logits: Tensor, query: Tensor, sentinel: Tensor, slots: Tensor, ceiling: Tensor) -> Tensor:
    """The model's logits (R, n, V) -> those of the mixture, in their type and with the same sum of exponentials.

    Where all of a row's slots are empty nothing changes. The other arguments are those of `pointer_shares`.
    """
    filled, tokens = slots[..., -1] > 0, slots[..., -1].long().sub(1).clamp_min(0)
    size, rows = query.shape[1], len(slots)
    with in_full(query.device):
        parts = [
            _mixed(*(each[:, some] for each in (logits, query, sentinel)), slots, tokens, filled, ceiling)
            for some in _chunks(size, slots, rows)
        ]
    return torch.cat(parts, dim=1)


def _mixed(logits, query, sentinel, slots, tokens, filled, ceiling):
    """Logits (R, p, V) of some positions -> the mixture's; tokens of the slots, and whether they hold any, (R, S)."""
    exponentials = (query @ slots[..., :-1].mT - ceiling).exp() * filled[:, None]
    log_model = _log_model(sentinel, exponentials.sum(dim=-1), ceiling)
    copied = exponentials.new_zeros(logits.shape)
    copied = copied.scatter_add(2, tokens[:, None].expand_as(exponentials), exponentials)
    wide = widen(logits)
    # A share is its exponential, times that of the model's share, over the sentinel's exponential.
    factor = (wide.logsumexp(dim=-1) + log_model - sentinel + ceiling)[..., None]
    return torch.logaddexp(wide + log_model[..., None], _log(copied) + factor).to(logits.dtype)


class _Shares(torch.autograd.Function):
    """With a_i = exp(s_i) / (E + Z), E the sentinel's exponential: d log a_0 / d s_i = -a_i, and for the share c at the
    target d c / d s_i = a_i ([i points at it] - c)."""

    @staticmethod
    def forward(ctx, query, sentinel, slots, targets, ceiling):
        log_model, copied = torch.empty_like(sentinel), torch.empty_like(sentinel)
        for at, exponentials, matches, _ in _scores(query, slots, targets, ceiling):
            own = sentinel[at]
            log_model[at] = _log_model(own, exponentials.sum(dim=1), ceiling)
            matched = torch.zeros_like(own).index_add_(0, matches[0], exponentials[matches])
            copied[at] = matched * (log_model[at] - own + ceiling).exp()
        ctx.save_for_backward(query, sentinel, slots, targets, ceiling, log_model, copied)
        return log_model, copied

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_log_model, grad_copied):
        query, sentinel, slots, targets, ceiling, log_model, copied = ctx.saved_tensors
        grad_query, grad_slots = torch.zeros_like(query), torch.zeros_like(slots)
        to_shares = (log_model - sentinel + ceiling).exp()  # what makes exponentials shares
        both = grad_log_model + grad_copied * copied
        for at, exponentials, matches, keys in _scores(query, slots, targets, ceiling):
            matched = exponentials[matches] * (grad_copied[at] * to_shares[at])[matches[0]]
            grad_scores = exponentials.mul_((-both[at] * to_shares[at])[:, None])
            grad_scores[matches] += matched
            grad_query[at] = grad_scores @ keys[:-1].T
            grad_slots[at[0], :, :-1] += grad_scores.T @ query[at]
        return grad_query, grad_log_model - both * log_model.exp(), grad_slots, None, None


def _scores(query, slots, targets, ceiling):
    """Some positions of one row at a time.

    Yields:
        (row, slice of positions); exponentials (n, S); indices of those whose slots hold the position's target; keys.
    """
    extended, buffer = _with_one(query), query.new_empty(_step(slots), slots.shape[1])
    for row, (own, wanted) in enumerate(zip(slots, targets, strict=True)):
        keys = _keys(own, ceiling)
        tokens, order = own[:, -1].long().sub(1).sort()
        for positions in _chunks(query.shape[1], own):
            exponentials = torch.mm(
                extended[row, positions], keys, out=buffer[: positions.stop - positions.start]
            ).exp_()
            yield (row, positions), exponentials, _matches(tokens, order, wanted[positions]), keys


def _matches(tokens, order, targets):
    """Sorted tokens (S,) and the slots that they stand in, targets (n,) -> indices (2, m) of positions and slots."""
    targets = targets.masked_fill(targets < 0, tokens.new_tensor(2**62))  # empty slots count as token -1
    first, end = (torch.searchsorted(tokens, targets, right=right) for right in (False, True))
    counts = end - first
    positions = torch.arange(len(targets), device=targets.device).repeat_interleave(counts)
    inside = torch.arange(len(positions), device=targets.device) - (counts.cumsum(0) - counts)[positions]
    return positions, order[first[positions] + inside]


def _chunks(positions, slots, rows=1):
    """Slices of so many positions whose scores, in so many rows, exist at a time."""
    step = max(1, _step(slots) // rows)
    return [slice(start, min(start + step, positions)) for start in range(0, positions, step)]


def _step(slots):
    """Positions of one row whose scores against slots (..., S, w + 1) are made at a time."""
    return max(1, (GPU_SCORES if slots.is_cuda else CPU_SCORES) // max(1, slots.shape[-2]))


def _keys(slots, ceiling):
    """Slots (..., S, w + 1) -> (..., w + 1, S): keys, and below them what is added to scores, which makes nothing of
    empty slots."""
    below = torch.where(slots[..., -1] > 0, -ceiling, NOTHING)
    return torch.cat((slots[..., :-1].mT, below[..., None, :]), dim=-2)


def _with_one(query):
    """(..., w) -> (..., w + 1)"""
    return torch.nn.functional.pad(query, (0, 1), value=1.0)


def _log_model(sentinel, total, ceiling):
    """Log of the model's share, from the sum of the slots' exponentials."""
    return sentinel - torch.logaddexp(sentinel, _log(total) + ceiling)


def _log(values):
    """Of what may be zero, whose logarithm has no gradient: then of next to nothing."""
    return values.clamp_min(torch.finfo(values.dtype).tiny).log()
