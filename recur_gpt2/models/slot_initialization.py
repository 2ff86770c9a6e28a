"""From a pretrained GPT-2 to a model that reads on: show the new slots of memory where they stand."""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor, nn

from .calibration import SAMPLES, likely_tokens, read_plainly

SAMPLED_TOKENS = 256  # of them read at a time: building a model must not take more memory than using it


@torch.no_grad()
def fit_slots(model: nn.Module) -> None:
    """Start the memory's slots where the model reads them well, or leaves them alone, before any training.

    Last positions and sinks are to look as if they stood right in front of the window. A last-position slot holds keys
    and values made at the end of a full window, and they say so: through the position embedding, and through how much
    context they saw. The remedy is measured on the model itself, without data: likely tokens are read as a full
    window, and the last of them once more at the positions in front of a window; the difference of the mean keys and
    values, layer by layer, is the slots' initial shift. A sink starts as the mean key and value of the first
    position, and a pooled slot as an average token in front of the window. docs/ablation.md has what this gains.

    Where the window takes so many positions that too few are left in front of it, the slots stand from the first ones
    on all the same, beside the window's own first tokens: a slot that says "the end" is one that the window's queries
    have never seen in front of them, and costs far more than one that shares its position.

    Embeddings that a net writes (with `pool_layers`) start around the mean input that their layers get at the first
    position, on which heads rest: around zero, the layer norm would blow the untrained net's output up to the size of a
    token that heads listen to.
    """
    config = model.config
    if config.pool_layers:
        _fit_embeddings(model)
    elif model.recurrence.names():
        _fit_keys_and_values(model)


def _fit_keys_and_values(model):
    config = model.config
    last, offset, end = config.last_slots, config.position_offset, config.position_offset + config.window
    tokens = likely_tokens(model, (SAMPLES, end))
    at_end = _mean_keys_and_values(model, tokens, torch.arange(end))
    first = max(offset - last, min(config.sink_slots, 1))
    in_front = (first + torch.arange(last)).clamp_max(config.n_positions - 1)
    again = torch.cat((tokens[:, :1], tokens[:, end - last :]), dim=1)
    at_front = _mean_keys_and_values(model, again, torch.cat((torch.zeros(1, dtype=torch.int64), in_front)))
    for name in model.recurrence.names():
        recurrence, front, back = model.recurrence.get(name), at_front[int(name)], at_end[int(name)]
        if recurrence.sink is not None:
            recurrence.sink[:] = front[..., :1, :]
        if last:
            recurrence.shift[..., config.pooled_slots :, :] = front[..., 1:, :] - back[..., end - last :, :]
            pooled = front[..., 1:, :].mean(dim=-2) - back[..., offset:, :].mean(dim=-2)
            recurrence.shift[..., : config.pooled_slots, :] = pooled[..., None, :]


def _fit_embeddings(model):
    config = model.config
    reading = read_plainly(model, likely_tokens(model, (SAMPLES, 1)), torch.zeros(1, dtype=torch.int64))
    inputs = [hidden.mean(dim=(0, 1)) for hidden, *_ in reading]
    first = torch.stack([inputs[layer] for layer in config.insert_layers]).mean(dim=0)
    model.recurrence.get("pooled").net[-1].bias.copy_(first.repeat(config.pooled_slots))


def _mean_keys_and_values(model, tokens, positions) -> list[Tensor]:
    """Each layer's mean keys and values (2, H, n, d) of plain GPT-2 over (samples, n) tokens at (n,) positions."""
    sums = [0.0] * len(model.h)
    for samples in tokens.split(max(1, SAMPLED_TOKENS // len(positions))):
        read = islice(read_plainly(model, samples, positions), len(model.h))
        for layer, (_, _, key, value) in enumerate(read):
            sums[layer] = sums[layer] + torch.stack((key.sum(dim=0), value.sum(dim=0)))
    return [each / len(tokens) for each in sums]
