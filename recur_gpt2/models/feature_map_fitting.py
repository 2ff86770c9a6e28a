"""How far a layer's attention is from softmax's, and bringing it nearer: what new feature maps start from."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from ..ops.feature_maps import FeatureMap
from ..ops.hybrid import MixingGate
from ..utils.tensors import widen
from .block import is_feature_map
from .calibration import SAMPLES, likely_tokens, read_plainly

RIDGE = 1e-3  # of a gate's regression, as a part of its inputs' variance
PROBABILITY_FLOOR = 1e-4  # what a weight of zero counts as
FIT_STEPS = 200  # of Adam, for each feature map
DISTIL_STEPS = 100  # of Adam, for all feature maps together
DISTIL_RATE = 1e-2  # where these begin
DISTIL_PLACES = 128  # whose logits exist at a time
LONGEST_FIT = 256  # tokens that feature maps are fitted on: the fit is quadratic in them


@torch.no_grad()
def fit_feature_maps(model: nn.Module, tokens: Tensor | None = None) -> None:
    """Start the feature maps of linear layers where the model is nearest to itself with softmax, before any training.

    Measured on the model itself. First each map alone is fitted to the weights that its queries and keys have in
    softmax attention; then all maps together, and nothing else, learn to predict the next tokens that softmax attention
    predicts: what later layers make of an error shows there alone. docs/t2r.md compares this with other starts.

    Args:
        tokens: (samples, n) int64 to read, n at least a window; None for likely ones, which needs no data.
    """
    if not model.config.linear_layers:
        return
    _fit_one_by_one(model, tokens)
    _fit_together(model, tokens)


def _fit_one_by_one(model, tokens):
    layers, length = model.config.linear_layers, min(model.config.window, LONGEST_FIT)
    tokens = likely_tokens(model, (SAMPLES, length)) if tokens is None else tokens[:, :length]
    reading = read_plainly(model, tokens, torch.arange(length))
    with tqdm(total=len(layers), desc="fitting feature maps", unit="layer", leave=False) as bar:
        for block, (_, query, key, _) in zip(model.h, reading, strict=False):
            if block.feature_map is not None:
                with torch.enable_grad():
                    fit_to_softmax(
                        block.feature_map, query * block.query_factor, key, far_gate=block.far_gate, steps=FIT_STEPS
                    )
                bar.update()


def _fit_together(model, tokens):
    """Knowledge distillation (Hinton et al. 2015) from the model with softmax attention in all layers."""
    learning = [parameter for name, parameter in model.named_parameters() if is_feature_map(name)]
    if not learning:
        return
    window = model.config.window
    rows = max(1, LONGEST_FIT * 2 // window)
    tokens = likely_tokens(model, (rows * DISTIL_STEPS, window)) if tokens is None else tokens[:, :window]
    starts = torch.ones(rows, 1, dtype=torch.bool)
    optimizer = torch.optim.Adam(learning, DISTIL_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, DISTIL_STEPS)
    for step in tqdm(range(DISTIL_STEPS), desc="fitting them together", unit="step", leave=False):
        read = tokens[(torch.arange(rows) + step * rows) % len(tokens)][:, None].to(model.wte.weight.device)
        wanted = model.softmax_forward(read, starts).flatten(0, -2)
        with torch.enable_grad():
            given = model.forward_windows(read, starts, call_layer=_recomputed)[0].flatten(0, -2)
            gradients = torch.autograd.grad(_divergence(given, wanted, model.wte.weight.detach()), learning)
        for parameter, gradient in zip(learning, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()


def _divergence(given, wanted, head):
    """Mean over N positions of KL(wanted || given), of what two hidden states (N, D) predict. Logits of few of them
    exist at a time, so that a conversion takes no more memory than training does."""

    def of_some(given, wanted):
        wanted = (wanted @ head.T).log_softmax(dim=-1)
        return (wanted.exp() * (wanted - (given @ head.T).log_softmax(dim=-1))).sum()

    parts = zip(given.split(DISTIL_PLACES), wanted.split(DISTIL_PLACES), strict=True)
    return sum(_recomputed(of_some, *part) for part in parts) / len(given)


def _recomputed(function, *inputs):
    """What the function gives; for the gradient it is called again."""
    return checkpoint(function, *inputs, use_reentrant=False)


def softmax_divergence(
    feature_map: FeatureMap,
    query: Tensor,
    key: Tensor,
    visible: Tensor | None = None,
    *,
    far_gate: MixingGate | None = None,
) -> Tensor:
    """How far attention weights are from softmax's: mean Kullback-Leibler divergence in nats a query.

    Args:
        query, key: (B, H, T, d) and (B, H, S, d), as softmax attention takes them, the last query at the last key. It
            is quadratic in T.
        visible: (T, S) or (B, 1, T, S) bool, what each query attends to; None for S = T and causal.
        far_gate: of a layer that attends to near positions by softmax.

    Returns:
        (), with gradient for the map and the gate, and through them for q and k; softmax's side is taken as given.
    """
    wanted, weights = _both_weights(feature_map, far_gate, query, key, visible)
    log_weights = (weights.clamp_min(0) + PROBABILITY_FLOOR).log()
    divergence = (torch.xlogy(wanted, wanted) - wanted * log_weights).sum(dim=-1)
    # Only rfa has negative weights; what they let the others have above 1 in all must cost more than it gains.
    return (divergence - weights.clamp_max(0).sum(dim=-1)).mean()


def _both_weights(feature_map, far_gate, query, key, visible):
    """Attention weights (B, H, T, S), softmax's and those of the map."""
    query, key = widen(query), widen(key)
    if visible is None:
        visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    scaled = query * feature_map.width**-0.5
    scores = scaled @ key.mT
    with torch.no_grad():
        wanted = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    query, key = feature_map.features(query, key)
    products = (query @ key.mT) * visible
    if far_gate is None:
        # The ratio first, then its logarithm: were both floored apart, features that are all zero would fit best.
        return wanted, products / products.sum(dim=-1, keepdim=True).clamp_min(feature_map.floor)
    near = _distances(visible) < far_gate.near_tokens
    return wanted, _with_near(products * ~near, scores, visible & near, far_gate(scaled), feature_map.floor)


def fit_to_softmax(
    feature_map: FeatureMap,
    query: Tensor,
    key: Tensor,
    *,
    far_gate: MixingGate | None = None,
    steps: int = 200,
    learning_rate: float = 1e-2,
    batch_size: int = 2,
) -> float:
    """Fit a map alone, in place, to the softmax weights of given queries and keys, by Adam on `softmax_divergence`.

    Args:
        query, key: (B, H, T, d), of which each step takes `batch_size` rows.
        far_gate: fitted with the map, from what `fit_gate` finds.

    Returns:
        The divergence over all rows afterwards.
    """
    if far_gate is not None:
        fit_gate(feature_map, far_gate, query, key)
    modules = [feature_map] if far_gate is None else [feature_map, far_gate]
    parameters = [each for module in modules for each in module.parameters() if each.requires_grad]
    if parameters:  # elu has none
        optimizer = torch.optim.Adam(parameters, learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            rows = torch.randint(len(query), (batch_size,), generator=generator).to(query.device)
            loss = softmax_divergence(feature_map, query[rows].detach(), key[rows].detach(), far_gate=far_gate)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        rows = zip(query, key, strict=True)
        each = [softmax_divergence(feature_map, q[None], k[None], far_gate=far_gate) for q, k in rows]
        return float(torch.stack(each).mean())


@torch.no_grad()
def fit_gate(feature_map: FeatureMap, far_gate: MixingGate, query: Tensor, key: Tensor) -> None:
    """Set a gate, in place: the regression of what far positions weigh in softmax on what they weigh through the map.

    The two differ by several nats as a map is made. Left to gradient descent, heads stop looking far before
    the gate gets there, and never look again.

    Args:
        query, key: (B, H, T, d), as softmax attention takes them; nothing is done where T is not more than is near.
    """
    far = _distances(torch.ones(query.shape[2], key.shape[2], device=query.device)) >= far_gate.near_tokens
    if not far.any():
        return
    rows = zip(query.split(1), key.split(1), strict=True)  # the weights of all of them would be large
    missing = torch.cat([_log_ratio(feature_map, *row, far) for row in rows])
    missing, inputs = (
        each[:, :, far_gate.near_tokens :].transpose(0, 1).flatten(1, 2)
        for each in (missing, widen(query) * feature_map.width**-0.5)
    )
    mean, offset = inputs.mean(dim=1, keepdim=True), missing.mean(dim=1, keepdim=True)
    inputs, missing = (inputs - mean).double(), (missing - offset).double()
    moments = inputs.mT @ inputs
    size = moments.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
    moments += RIDGE * (size + 1e-12) * torch.eye(inputs.shape[2], dtype=moments.dtype, device=moments.device)
    weight = torch.linalg.solve(moments, inputs.mT @ missing[..., None])[..., 0].to(mean.dtype)
    far_gate.weight.copy_(weight)
    far_gate.bias.copy_(offset[:, 0] - (weight * mean[:, 0]).sum(dim=1))


def _log_ratio(feature_map, query, key, far):
    """What far positions weigh in softmax over what they weigh through the map, in logarithms: (B, H, T)."""
    query, key = widen(query), widen(key)
    wanted = (query @ key.mT * feature_map.width**-0.5).masked_fill(~far, -torch.inf).logsumexp(dim=-1)
    phi_query, phi_key = feature_map.features(query, key)
    return wanted - ((phi_query @ phi_key.mT) * far).sum(dim=-1).clamp_min(feature_map.floor).log()


def _distances(visible):
    """(T, S), how many positions in front of a query a key stands."""
    length, span = visible.shape[-2:]
    positions = torch.arange(span, device=visible.device)
    return positions[span - length :, None] - positions


def _with_near(products, scores, near, gate, floor):
    """Weights (B, H, T, S): of near positions by softmax, of far ones by products of features. See hybrid.py."""
    scores = scores.masked_fill(~near, -torch.inf)
    total = products.sum(dim=-1, keepdim=True)
    factor = gate.masked_fill(total < floor, -torch.inf)
    top = torch.maximum(scores.amax(dim=-1, keepdim=True), factor + total.clamp_min(floor).log()).detach()
    weights = (scores - top).exp() + products * (factor - top).exp()
    return weights / weights.sum(dim=-1, keepdim=True)
