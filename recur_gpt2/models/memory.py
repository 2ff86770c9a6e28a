"""The recurrence: what one window leaves for the next.

Layers have one of two forms, beside PointerMemory (pointer.py), which is for the head. `LayerMemory` (the default)
makes a layer's memory from that same layer's keys and values in the window before, so windows need not wait for each
other. `PooledMemory` (Yoshida et al. 2020) pools the hidden states of higher layers into an embedding that a lower
layer attends to, so they must.

Each form has `write` (a window -> raw memory, which the state carries) and `read` (raw memory -> what the next window
attends to). Whatever is learned per slot is applied on reading: it gets its gradient even when each window is its own
segment of truncated BPTT.
"""

from math import prod

import torch
from einops import rearrange
from torch import Tensor, nn

from ..utils.tensors import widen
from .configuration import RecurGPT2Config
from .pointer import POINTER, PointerMemory


class LayerMemory(nn.Module):
    """One layer's memory, made from its own keys and values. B rows, W windows, H heads, d = D / H.

    The slots are, in this order: `sink_slots` constants, `pooled_slots` with gated carry-over, `last_slots` last
    positions. Keys and values are computed by the window anyway, so that the slots cost no projection.
    """

    def __init__(self, config: RecurGPT2Config):
        super().__init__()
        heads, width = config.n_head, config.n_embd // config.n_head
        self.pooled_slots, self.last_slots = config.pooled_slots, config.last_slots
        self.sink_slots = config.sink_slots
        self.shapes = {
            "sink": (2, heads, config.sink_slots, width),
            "shift": (2, heads, config.pooled_slots + config.last_slots, width),
            "pool_query": (heads, config.pooled_slots, width),
            "gate_weight": (heads, config.pooled_slots, width),
            "gate_bias": (heads, config.pooled_slots),
        }
        for name, shape in self.shapes.items():  # of no slots no parameter: tools stumble over empty ones
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)) if prod(shape) else None)
        self.reset_parameters()

    @property
    def slots(self) -> int:
        """M, slots that windows attend to."""
        return self.sink_slots + self.pooled_slots + self.last_slots

    def last_positions(self, window: int) -> int:
        """n, positions at the end of a window of T tokens that memory is written from."""
        return window if self.pooled_slots else self.last_slots

    def reset_parameters(self):
        """Pooling starts near the mean, and carries half of the old memory."""
        for name, parameter in self.named_parameters():
            if name == "pool_query":
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.zeros_(parameter)

    def write(self, key: Tensor, value: Tensor, previous: Tensor | None, has_memory: Tensor) -> Tensor:
        """Raw memory after each of W full windows.

        Args:
            key, value: (B, W, H, T, d).
            previous: (B, 2, H, slots, d) raw memory before the first of them, or None where no row has any.
            has_memory: (B, W) bool, whether each window continues the one before.

        Returns:
            (B, W, 2, H, slots, d), slots = pooled + last.
        """
        start = key.shape[-2] - self.last_slots
        last = torch.stack((key[..., start:, :], value[..., start:, :]), dim=2)
        if not self.pooled_slots:
            return last
        pooled = self._pool(key, value)
        gate = torch.einsum("bwhsd,hsd->bwhs", widen(pooled[:, :, 0]), widen(self.gate_weight))
        gate = torch.sigmoid(gate + widen(self.gate_bias))
        first = None if previous is None else previous[..., : self.pooled_slots, :]
        pooled = gated_scan(pooled, gate, first, has_memory.to(key.device))
        return torch.cat((pooled, last), dim=-2)

    def read(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """(..., 2, H, slots, d) raw memory -> keys and values (..., H, M, d), sinks first."""
        memory = raw if self.shift is None else raw + self.shift.to(raw.dtype)
        if self.sink is not None:
            sink = self.sink.to(raw.dtype).expand(*raw.shape[:-4], *self.sink.shape)
            memory = torch.cat((sink, memory), dim=-2)
        return memory.unbind(dim=-4)

    def empty(self, batch_size: int, like: Tensor) -> Tensor:
        """Raw memory for rows that have none (its values are never attended to)."""
        return like.new_zeros(batch_size, *self.shapes["shift"])

    def _pool(self, key, value):
        """Attention of learned queries over a window's positions, each head its own -> (B, W, 2, H, S, d)."""
        scores = torch.einsum("hsd,bwhtd->bwhst", self.pool_query.to(key.dtype), key)
        weights = widen(scores).softmax(dim=-1).to(key.dtype)
        return torch.stack((weights @ key, weights @ value), dim=2)


class PooledMemory(nn.Module):
    """Yoshida et al. 2020, section 3.1: mean over positions, learned mix over layers, feed-forward net -> embeddings.

    The net has three layers (D -> recurrence_width -> recurrence_width -> pooled_slots * D). Its output is a
    supplementary embedding: the insertion layers project it to keys and values as they do their own inputs.
    """

    def __init__(self, config: RecurGPT2Config):
        super().__init__()
        width, hidden = config.n_embd, config.recurrence_width
        self.slots = config.pooled_slots
        self.mix = nn.Parameter(torch.zeros(len(config.pool_layers)))
        self.net = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(approximate="tanh"),
            nn.Linear(hidden, hidden),
            nn.GELU(approximate="tanh"),
            nn.Linear(hidden, self.slots * width),
        )

    def reset_parameters(self):
        nn.init.zeros_(self.mix)
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def read(self, raw: Tensor) -> Tensor:
        """(..., len(pool_layers), D) mean hidden states of the window before -> embeddings (..., M, D)."""
        mixed = (raw * self.mix.softmax(dim=0)[:, None]).sum(dim=-2)
        return rearrange(self.net(mixed.to(self.mix.dtype)), "... (m d) -> ... m d", m=self.slots)


class Recurrence(nn.Module):
    """All that makes memory, by name: a LayerMemory for each insertion layer, one PooledMemory, "pooled", or nothing;
    and a PointerMemory, "pointer".

    Not an nn.ModuleDict, which PEFT would not take as one of its `modules_to_save`; and asked by methods alone, which
    pass through what PEFT puts around it.
    """

    def __init__(self, config: RecurGPT2Config):
        super().__init__()
        if config.pool_layers:
            self.add_module("pooled", PooledMemory(config))
        else:
            for layer in config.insert_layers:
                self.add_module(str(layer), LayerMemory(config))
        self.pointer = PointerMemory(config) if config.pointer_slots else None

    def get(self, name: str) -> LayerMemory | PooledMemory | None:
        """The module of this name, if there is one."""
        return self._modules.get(name)

    def names(self) -> list[str]:
        """Of what layers read."""
        return [name for name in self._modules if name != POINTER]


def gated_scan(fresh: Tensor, gate: Tensor, first: Tensor | None, has_memory: Tensor) -> Tensor:
    """m_w = g_w m_{w-1} + (1 - g_w) u_w, for all W windows at once; m_w = u_w where a document starts.

    The gates do not depend on m, so m_w = sum over j <= w of (g_{j+1} ... g_w) (1 - g_j) u_j: one small matrix of
    decays applied to all windows, in place of W steps that wait for each other.

    Args:
        fresh: u, (B, W, 2, H, S, d).
        gate: g, (B, W, H, S) float32 in (0, 1).
        first: m before window 0, (B, 2, H, S, d), or None where no row has any.
        has_memory: (B, W) bool on the same device, false where a document starts.

    Returns:
        m, (B, W, 2, H, S, d) in the type of `fresh`.
    """
    if first is None:
        first = torch.zeros_like(fresh[:, 0])
    has = has_memory[:, :, None, None]
    log_gate = torch.where(has, gate.clamp_min(1e-20).log(), torch.zeros_like(gate))
    weight = torch.where(has, 1 - gate, torch.ones_like(gate))
    weight = torch.cat((torch.ones_like(weight[:, :1]), weight), dim=1)  # (B, 1 + W, H, S), `first` in front
    total = torch.cat((torch.zeros_like(log_gate[:, :1]), log_gate), dim=1).cumsum(dim=1)
    document = nn.functional.pad((~has_memory).int(), (1, 0)).cumsum(dim=1)  # (B, 1 + W), which document each is in
    same = document[:, 1:, None] == document[:, None, :]
    earlier = torch.ones(same.shape[1:], dtype=torch.bool, device=same.device).tril(1)
    reaches = (same & earlier)[..., None, None]  # (B, W, 1 + W, 1, 1)
    decay = total[:, 1:, None] - total[:, None, :]
    decay = torch.where(reaches, decay, torch.full_like(decay, -torch.inf)).exp() * weight[:, None]
    with torch.autocast(fresh.device.type, enabled=False):
        sources = widen(torch.cat((first[:, None], fresh), dim=1))
        return torch.einsum("bwjhs,bjchsd->bwchsd", decay, sources).to(fresh.dtype)
