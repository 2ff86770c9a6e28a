"""Next-token cross-entropy from hidden states, without ever holding all logits.

A window of T tokens and a vocabulary of V has T * V logits: for GPT-2's V they outweigh everything else in training.
Here they exist one chunk of positions at a time, and the gradient is made while the chunk is at hand.
"""

import torch
from torch import Tensor

IGNORE = -100
CHUNK_LOGITS = 2**22  # logits at a time: small enough for a processor's cache, large enough for a GPU


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats at every position, without gradient.

    Args:
        hidden: (..., D), outputs of the final layer norm.
        weight: (V, D), the LM head.
        targets: (...) int64; -100 for a position that is not scored.

    Returns:
        (...) float32, zero where not scored.
    """
    flat, target = hidden.flatten(0, -2), targets.flatten()
    losses = torch.zeros(len(flat), device=hidden.device)
    with torch.no_grad():
        for rows in _chunks(len(flat), weight.shape[0]):
            losses[rows] = torch.nn.functional.cross_entropy(
                (flat[rows] @ weight.T.to(flat.dtype)).float(), target[rows], ignore_index=IGNORE, reduction="none"
            )
    return losses.view(targets.shape)


def summed_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The sum of `token_losses`, differentiable in `hidden` and `weight`. -> () float32 (float64 for inputs in it)

    Under autocast the products run in the autocast type; the softmax and the sums are never in 16 bit.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if not torch.is_grad_enabled():  # apply does not ask, and would make gradients that nobody wants
        hidden, weight = hidden.detach(), weight.detach()
    return _SummedLoss.apply(hidden.flatten(0, -2), weight, targets.flatten(), dtype)


def _chunks(rows, vocabulary):
    step = max(64, CHUNK_LOGITS // vocabulary)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


class _SummedLoss(torch.autograd.Function):
    """d loss / d logits is softmax - onehot, so one pass over the chunks gives loss and gradients."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype):
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        low, head = hidden.to(dtype), weight.to(dtype)
        grad_hidden = torch.empty_like(low) if wanted else None
        wide = torch.promote_types(dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=wide) if wanted else None
        total = hidden.new_zeros((), dtype=wide)
        for rows in _chunks(len(low), len(head)):
            scored = targets[rows] != IGNORE
            target = targets[rows].clamp_min(0)[:, None]
            softmax = (low[rows] @ head.T).softmax(dim=-1, dtype=total.dtype)
            picked = softmax.gather(1, target)
            total -= (picked.clamp_min(torch.finfo(total.dtype).tiny).log().squeeze(1) * scored).sum()
            if wanted:
                grad = softmax.scatter_(1, target, picked - 1).mul_(scored[:, None]).to(dtype)
                torch.mm(grad, head, out=grad_hidden[rows])
                grad_weight += grad.T @ low[rows]
        if wanted:
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad_total):
        grad_hidden, grad_weight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        return (grad_hidden * grad_total).to(hidden_dtype), (grad_weight * grad_total).to(weight_dtype), None, None
