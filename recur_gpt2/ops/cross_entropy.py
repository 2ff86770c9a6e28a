"""Next-token cross-entropy from hidden states, without ever holding all logits.

A window of T tokens and a vocabulary of V has T * V logits: for GPT-2's V they outweigh everything else in training.
Here they exist one chunk of positions at a time, and the gradient is made while the chunk is at hand.
"""

import torch
from torch import Tensor

from ..utils.tensors import IGNORE_INDEX

# Of a mixture (ops/pointer.py): the log of the model's share, and the share that points at the target, (...) each.
Shares = tuple[Tensor, Tensor]

# A chunk: on a CPU, rows enough that the products outweigh reading the head and adding to its gradient, which are the
# same for any number of them (docs/performance.md); elsewhere few large kernels, a quarter of a gigabyte of logits.
CPU_ROWS = 256
LOGITS = 2**26
CPU_LOGITS = 2**23  # at most: rows of GPT-2's own vocabulary are long
# Rows of the head that are multiplied at a time: a whole one in 16 bit, or of its gradients beside their sum, would be
# as large as the weights.
VOCABULARY_ROWS = 4096
CASTS = 2  # chunks that cast these rows each for itself; for more the head is cast once, and kept meanwhile


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, shares: Shares | None = None) -> Tensor:
    """Cross-entropy in nats at every position, without gradient.

    Args:
        hidden: (..., D), outputs of the final layer norm.
        weight: (V, D), the LM head.
        targets: (...) int64; -100 for a position that is not scored.
        shares: of a mixture, whose losses are wanted, (...) each as `targets`; None for the model's own.

    Returns:
        (...) float32, zero where not scored.
    """
    flat, target = hidden.flatten(0, -2), targets.flatten()
    shares = () if shares is None else tuple(each.flatten() for each in shares)
    losses = torch.zeros(len(flat), device=hidden.device)
    with torch.no_grad():
        chunks, weight = _chunks(flat, weight)
        for rows in chunks:
            nats = _exponentials(flat[rows], weight, target[rows], _wide(flat.dtype))[0]
            if shares:
                nats, _ = _mixed(nats, *(each[rows] for each in shares), target[rows] != IGNORE_INDEX)
            losses[rows] = nats.float()
    return losses.view(targets.shape)


def summed_loss(hidden: Tensor, weight: Tensor, targets: Tensor, shares: Shares | None = None) -> Tensor:
    """The sum of `token_losses`, differentiable in `hidden`, `weight` and `shares`. -> () float32 (float64 for inputs
    in it)

    Under autocast the products run in the autocast type; the softmax and the sums are never in 16 bit.

    Args:
        shares: as in `token_losses`.
    """
    dtype = _dtype(hidden)
    shares = () if shares is None else tuple(each.flatten() for each in shares)
    if not torch.is_grad_enabled():  # apply does not ask, and would make gradients that nobody wants
        hidden, weight, shares = hidden.detach(), weight.detach(), tuple(each.detach() for each in shares)
    return _SummedLoss.apply(hidden.flatten(0, -2), weight, targets.flatten(), dtype, *shares)


def loss_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of cross-entropies where the logits are there already, differentiable in them. -> () float32 or wider

    Softmax and sums are never in 16 bit. Some rows at a time: all of them in float32 would be the logits once more.

    Args:
        logits: (..., V).
        targets: (...) int64; -100 where nothing is scored.
    """
    return _LossOfLogits.apply(logits.flatten(0, -2), targets.flatten())


def accumulate_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, shares: Shares | None = None
) -> tuple[Tensor | None, Shares | None]:
    """The backward pass of `scale * summed_loss(...)` at once: the head's gradient is added to `weight.grad` in place.

    So that no second tensor as large as the head stands beside its gradient.

    Args:
        weight: (V, D), a leaf; left alone if it needs no gradient.
        scale: (), what the loss's gradient is multiplied by.
        shares: as in `summed_loss`.

    Returns:
        The gradients of `hidden`, None if it needs none, and of the shares.
    """
    with torch.no_grad():
        if weight.requires_grad and weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        wanted = hidden.requires_grad, weight.requires_grad
        flat = hidden.detach().flatten(0, -2)
        into = weight.grad if weight.requires_grad else None
        flat_shares = () if shares is None else tuple(each.detach().flatten() for each in shares)
        _, (grad_hidden, _, *grad_shares) = _loss_and_gradients(
            flat, weight.detach(), targets.flatten(), _dtype(hidden), wanted, flat_shares, scale, into
        )
    grad_hidden = None if grad_hidden is None else grad_hidden.view(hidden.shape).to(hidden.dtype)
    return grad_hidden, None if shares is None else tuple(each.view(targets.shape) for each in grad_shares)


def cpu_chunk_rows(vocabulary: int) -> int:
    """Positions whose logits exist at a time on a CPU."""
    return max(1, min(CPU_ROWS, CPU_LOGITS // vocabulary))


def _dtype(hidden):
    """What the products run in: the autocast type, if there is one."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _chunks(hidden, weight):
    """Slices of the rows of `hidden` (N, D), and the head (V, D) for them, cast if that pays."""
    on_cpu = hidden.device.type == "cpu"
    step = cpu_chunk_rows(len(weight)) if on_cpu else max(CPU_ROWS, LOGITS // len(weight))
    chunks = [slice(start, min(start + step, len(hidden))) for start in range(0, len(hidden), step)]
    return chunks, weight.to(hidden.dtype) if len(chunks) > CASTS else weight


class _SummedLoss(torch.autograd.Function):
    """d loss / d logits is softmax - onehot, so one pass over the chunks gives loss and gradients."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype, *shares):
        total, ctx.gradients = _loss_and_gradients(hidden, weight, targets, dtype, ctx.needs_input_grad, shares)
        ctx.save_for_backward(hidden, weight, targets, *shares)
        ctx.dtype = dtype
        return total

    @staticmethod
    def backward(ctx, grad_total):
        hidden, weight, targets, *shares = ctx.saved_tensors
        # Scaled in place and given away: a second tensor as large as the head would stand at the peak of memory. So a
        # graph that is run through twice makes them again.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            _, gradients = _loss_and_gradients(hidden, weight, targets, ctx.dtype, ctx.needs_input_grad, shares)
        inputs = hidden, weight, *shares
        scaled = [
            None if gradient is None else gradient.mul_(grad_total).to(given.dtype)
            for gradient, given in zip(gradients, inputs, strict=True)
        ]
        return *scaled[:2], None, None, *scaled[2:]


class _LossOfLogits(torch.autograd.Function):
    """d loss / d logits is softmax - onehot: made in the backward pass, from the logits and their log-sums."""

    @staticmethod
    def forward(ctx, logits, targets):
        scored, wide = targets != IGNORE_INDEX, _wide(logits.dtype)
        sums = logits.new_empty(len(logits), dtype=wide)
        for rows in _row_chunks(logits):
            torch.logsumexp(logits[rows].to(wide), dim=1, out=sums[rows])
        picked = logits.gather(1, targets.clamp_min(0)[:, None]).squeeze(1).to(wide)
        ctx.save_for_backward(logits, targets, sums)
        return ((sums - picked) * scored).sum()

    @staticmethod
    def backward(ctx, grad_total):
        logits, targets, sums = ctx.saved_tensors
        factor = (targets != IGNORE_INDEX) * grad_total
        gradient = torch.empty_like(logits)
        for rows in _row_chunks(logits):
            wide = (logits[rows].to(sums.dtype) - sums[rows, None]).exp_()
            wide.scatter_add_(1, targets[rows].clamp_min(0)[:, None], wide.new_full((len(wide), 1), -1.0))
            gradient[rows] = wide.mul_(factor[rows, None])
        return gradient, None


def _row_chunks(logits):
    step = cpu_chunk_rows(logits.shape[1])
    return [slice(start, start + step) for start in range(0, len(logits), step)]


def _loss_and_gradients(hidden, weight, targets, dtype, wanted, shares=(), scale=1.0, into=None):
    """(N, D), (V, D), (N,) -> the loss (), and its gradients (N, D) and (V, D), None where not `wanted`, and (N,) for
    each of the shares.

    The gradients are multiplied by `scale`; that of the weight is added to `into` (V, D), if given.
    """
    low, wide = hidden.to(dtype), _wide(dtype)
    grad_hidden = torch.zeros_like(low, dtype=wide) if wanted[0] else None
    grad_weight = torch.zeros_like(weight, dtype=wide) if wanted[1] and into is None else into
    total = low.new_zeros((), dtype=wide)
    factor = (targets != IGNORE_INDEX) * torch.as_tensor(scale, dtype=wide)
    grad_shares = [torch.zeros_like(each) for each in shares]
    chunks, head = _chunks(low, weight)
    for rows in chunks:
        nats, gradient, sums = _exponentials(low[rows], head, targets[rows], wide)
        own = factor[rows]
        if shares:
            nats, model = _mixed(nats, *(each[rows] for each in shares), targets[rows] != IGNORE_INDEX)
            for grad, each in zip(grad_shares, (model, nats.exp()), strict=True):
                grad[rows] = -each * own
            own = own * model
        total += nats.sum()
        if any(wanted[:2]):  # softmax - onehot, times the factor
            gradient *= (own / sums)[:, None]
            gradient.scatter_add_(1, targets[rows].clamp_min(0)[:, None], -own[:, None])
            _add_products(gradient, low[rows], head, grad_hidden[rows] if wanted[0] else None, grad_weight)
        del gradient  # the largest tensor: gone before the next one is made
    return total, (grad_hidden, grad_weight, *grad_shares)


def _mixed(nats, log_model, copied, scored):
    """(n,) each -> nats of the mixture, zero where not scored, and the model's part of what the target got."""
    model = log_model - nats
    mixed = -torch.logaddexp(model, copied.log()) * scored
    return mixed, (model + mixed).exp()


def _add_products(gradient, hidden, weight, grad_hidden, grad_weight):
    """Gradients of hidden states (n, D) and weight (V, D), where there are such, += those of logits (n, V)."""
    for number, part in enumerate(gradient.split(VOCABULARY_ROWS, dim=1)):
        rows, low = slice(number * VOCABULARY_ROWS, (number + 1) * VOCABULARY_ROWS), part.to(hidden.dtype)
        if grad_hidden is not None:
            _add_product(grad_hidden, low, weight[rows].to(hidden.dtype))
        if grad_weight is not None:
            _add_product(grad_weight[rows], low.T, hidden)


def _add_product(total, left, right):
    """total += left @ right, which are in `total`'s type or a lower one."""
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, out=total)  # addmm_ is not counted by torch's FlopCounterMode
    else:
        total += left @ right


def _exponentials(hidden, weight, targets, wide):
    """(n, D), (V, D), (n,) -> nats (n,), zero where not scored; and what softmax divides by its sums: (n, V), (n,).

    In the type `wide`, in one tensor throughout, made some rows of `weight` at a time.
    """
    logits = hidden.new_empty(len(hidden), len(weight), dtype=wide)
    for part, rows in zip(logits.split(VOCABULARY_ROWS, dim=1), weight.split(VOCABULARY_ROWS), strict=True):
        if hidden.dtype == wide:
            torch.mm(hidden, rows.to(wide).T, out=part)
        else:
            part.copy_(hidden @ rows.to(hidden.dtype).T)
    logits -= logits.amax(dim=1, keepdim=True)
    picked = logits.gather(1, targets.clamp_min(0)[:, None]).squeeze(1)
    sums = logits.exp_().sum(dim=1)
    return (sums.log() - picked) * (targets != IGNORE_INDEX), logits, sums


def _wide(dtype):
    """What softmax and sums are in: never 16 bit."""
    return torch.promote_types(dtype, torch.float32)
