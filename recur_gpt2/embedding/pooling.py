"""What was read of a document -> one vector."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.bundle import POOLINGS
from ..errors import InputError
from ..models.memory import PooledMemory
from ..models.modeling import RecurGPT2Model
from ..models.state import RecurState
from .batching import Reading


def check_pooling(model: RecurGPT2Model, pooling: str, layer: int) -> None:
    """Raises InputError where the model has no such vector."""
    if pooling not in POOLINGS:
        raise InputError(f"pooling={pooling!r} is not known; use one of {', '.join(POOLINGS)}")
    if "memory" not in pooling:
        return
    names = model.recurrence.names()
    if not names or not model.config.pooled_slots + model.config.last_slots:
        raise InputError(f"pooling={pooling!r} needs a model with a recurrence, and this one has none; use mean")
    if "pooled" not in names and str(layer - 1) not in names:
        having = ", ".join(str(int(name) + 1) for name in names)
        raise InputError(f"layer={layer} leaves no memory for pooling={pooling!r}; use a layer that does: {having}")


def pool(model: RecurGPT2Model, reading: Reading, pooling: str, layer: int, *, normalize: bool) -> Tensor:
    """One vector a document, zero for documents without tokens.

    mean: of the hidden states. last: the last token's. memory: what the document's last full window left for the next
    one, see `memory_vectors`. mean+memory: both, each scaled to unit length, one behind the other.

    Args:
        layer: that was read, as `layer` of the model.
        normalize: scale each vector to unit length.

    Returns:
        (B, D) float32 or wider; (B, 2 D) for mean+memory.
    """
    if pooling == "last":
        vectors = reading.last
    elif pooling == "mean":
        vectors = _mean(reading)
    elif pooling == "memory":
        vectors = memory_vectors(model, layer, reading)
    else:
        both = _mean(reading), memory_vectors(model, layer, reading)
        vectors = torch.cat([unit(each) for each in both], dim=1)
    vectors = vectors.float()
    return unit(vectors) if normalize else vectors


def dimension(model: RecurGPT2Model, pooling: str) -> int:
    """Numbers a vector."""
    return model.config.n_embd * (2 if pooling == "mean+memory" else 1)


def unit(vectors: Tensor) -> Tensor:
    """(..., D) scaled to unit length; zeros stay."""
    return torch.nn.functional.normalize(vectors, dim=-1)


def memory_vectors(model: RecurGPT2Model, layer: int, reading: Reading) -> Tensor:
    """(B, D): the mean over the slots of the memory that each document's last full window left, without sinks.

    Of a memory of keys and values, the values of the layer that `layer` counts to; of supplementary embeddings
    (`pool_layers`), these. Zero for a document shorter than a window: it has left none.
    """
    state, width = reading.state, model.config.n_embd
    if not state.memory:
        return reading.sums.new_zeros(len(reading.tokens), width)
    has_memory = (state.windows > 0).to(reading.sums.device)
    return _memory(model, layer, state) * has_memory[:, None]


def _memory(model, layer, state: RecurState):
    if "pooled" in state.memory:
        recurrence: PooledMemory = model.recurrence.get("pooled")
        return recurrence.read(state.memory["pooled"]).mean(dim=1)
    values = state.memory[str(layer - 1)][:, 1]  # (B, H, slots, d)
    return values.mean(dim=2).flatten(1)


def _mean(reading):
    counts = reading.tokens.clamp_min(1).to(reading.sums.device)
    return reading.sums / counts[:, None]
