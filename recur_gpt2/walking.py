"""A stretch of windows through the layers, in the order that the recurrence allows.

B rows, W windows, T tokens a window, D width, H heads, M slots, d = D / H, p = len(pool_layers).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .attention import KeyValue
from .linear_attention import LinearState, absorb
from .reading import FreshWindows
from .recurrence import widen

Teach = Callable[["RecurGPT2Block", Tensor, Tensor, Tensor | None, bool | Tensor], None]

if TYPE_CHECKING:
    from .layers import RecurGPT2Block
    from .modeling import RecurGPT2Model


class LayerWalk:
    """A layer's memory is made from that layer itself: all windows pass one layer, then the next one.

    Attributes:
        memory, window: what the stretch leaves, in RecurState's terms; complete after `run`.
    """

    def __init__(self, model: RecurGPT2Model, stretch: FreshWindows, *, every_layer: bool, teach: Teach | None = None):
        """
        Args:
            every_layer: keep the output of each layer, not of the last one alone.
            teach: read with softmax attention in all layers, and show this function what those attend to whose own
                attention is linear.
        """
        self.model, self.stretch, self.every_layer, self.teach = model, stretch, every_layer, teach
        self.has_memory = stretch.reads()
        self.memory: dict[str, Tensor] = {}
        self.window: dict[str, Tensor] = {}

    def run(self, hidden: Tensor) -> list[Tensor]:
        """(B, W, T, D) embeddings -> the output of each layer, or of the last one."""
        outputs = []
        for layer in range(len(self.model.h)):
            hidden = self._layer(layer, hidden)
            outputs = self._kept(outputs, hidden)
        return outputs

    def _kept(self, outputs, hidden):
        return [*outputs, hidden] if self.every_layer else [hidden]

    def _layer(self, layer, hidden):
        name, block = str(layer), self.model.h[layer]
        if self._is_linear(block):
            return self._linear_layer(layer, hidden)
        query, key, value = block.project(hidden)
        key, value = self.stretch.extend(name, key, value)
        written = self._write(name, lambda: (key, value))
        if any(self.stretch.filled):
            self.window[name] = self.stretch.unfinished(key, value)
        memory = self._read(name, written, value)
        return block.finish(hidden, self._attend(block, query, key, value, memory, self.has_memory))

    def _is_linear(self, block):
        return block.feature_map is not None and self.teach is None

    def _attend(self, block, query, key, value, memory, has_memory):
        """Softmax attention: (B, W, H, T, d) each, memory (B, W, H, M, d)."""
        if self.teach is not None and block.feature_map is not None:
            self.teach(block, query, key, None if memory is None else memory[0], has_memory)
        return self.stretch.attend(query, key, value, memory, has_memory, **block.attention_options)

    def _linear_layer(self, layer, hidden):
        name, block, stretch = str(layer), self.model.h[layer], self.stretch
        leaves_memory, count, length = name in self.model.recurrence, self._tail_length(name), hidden.shape[2]
        ends = slice(length - count, length) if stretch.fresh and not any(stretch.filled) else slice(None)
        query, key, value, raw = block.project_features(hidden, ends if leaves_memory else None)
        written = self._write(name, lambda: stretch.last_positions(name, raw, value, count))
        if leaves_memory and any(stretch.filled):
            self.window[f"tail.{name}"] = stretch.unfinished_tail(name, raw, value, count)
        memory = self._read(name, written, value) if stretch.fresh else None  # sums of windows begun have it already
        start = linear_start(block, stretch, name, key, value, memory, self.has_memory)
        attended, state = stretch.attend_linearly(query, key, value, start, block.feature_map.floor)
        if block.state_decay is not None:
            self._leave(f"linear.{name}", lambda: packed(state))
        if any(stretch.filled):
            self.window[f"linear.{name}"] = stretch.unfinished_sums(packed(state))
        return block.finish(hidden, attended)

    def _tail_length(self, name):
        """Positions at a window's end that a layer with linear attention has to keep keys and values of."""
        if name not in self.model.recurrence:
            return 0
        recurrence = self.model.recurrence[name]
        return self.model.config.window if recurrence.pooled_slots else recurrence.last_slots

    def _write(self, name, keys_and_values) -> Tensor | None:
        """The memory that each window leaves, (B, W, 2, H, slots, d); None where no window is full or none is left.

        `keys_and_values`: a function without arguments, called if they are needed.
        """
        if name not in self.model.recurrence:
            return None
        before = self.stretch.state.memory.get(name)
        return self._leave(
            name,
            lambda: self.model.recurrence[name].write(*keys_and_values(), before, self.stretch.has_memory),
        )

    def _leave(self, name, make) -> Tensor | None:
        """Keep what `make` gives for each window, (B, W, ...), of the last full one; what was there, if none is."""
        before, each = self.stretch.state.memory.get(name), None
        if any(self.stretch.completed):
            each = make()
            self.memory[name] = self.stretch.after_completed(each, before)
        elif before is not None:
            self.memory[name] = before
        return each

    def _read(self, name, written, like) -> KeyValue | None:
        """What each window attends to, (B, W, H, M, d)."""
        if name not in self.model.recurrence or self.has_memory is False:
            return None
        recurrence, before = self.model.recurrence[name], self.stretch.state.memory.get(name)
        first = recurrence.empty(len(like), like=like) if before is None else before
        raw = first[:, None]
        if like.shape[1] > 1:
            raw = torch.cat((raw.to(like.dtype), written[:, :-1]), dim=1)
        return recurrence.read(raw)


class PooledWalk(LayerWalk):
    """Memory is pooled from `pool_layers` (Yoshida et al. 2020).

    Windows wait for each other only in the band of layers from the first insertion to the last pooling. Below it and
    above it, and everywhere if all poolings lie below all insertions, they pass the layers together.
    """

    def __init__(self, model: RecurGPT2Model, stretch: FreshWindows, **options):
        super().__init__(model, stretch, **options)
        self.recurrence = model.recurrence["pooled"]
        self.sums: dict[int, list[Tensor]] = {layer: [] for layer in model.config.pool_layers}
        self.cache: dict[str, list[tuple[Tensor, ...]]] = {}

    def run(self, hidden: Tensor) -> list[Tensor]:
        config, windows = self.model.config, hidden.shape[1]
        first, top = min(config.insert_layers), max(config.pool_layers) + 1
        everything = slice(0, windows)
        outputs = self._span(range(min(first, top)), hidden, everything, None)
        below = outputs[-1] if outputs else hidden
        if first < top:
            outputs += self._band(range(first, top), below)
        memory = self._shifted(self._means())
        rest = outputs[-1] if outputs else hidden
        outputs += self._span(range(top, config.n_layer), rest, everything, memory)
        self._keep()
        return outputs

    def _band(self, layers, hidden):
        each = []
        before = self.stretch.state.memory.get("pooled")
        for window in range(hidden.shape[1]):
            here = slice(window, window + 1)
            memory = None if before is None else before[:, None]
            each.append(self._span(layers, hidden[:, here], here, memory))
            before = self._means(here)[:, 0]
        return [torch.cat(windows, dim=1) for windows in zip(*each, strict=True)]

    def _span(self, layers, hidden, windows, memory):
        """Some layers over some windows. memory: (B, W', p, D) raw memory that these windows read, or None."""
        outputs, has_memory = [], self.stretch.reads(windows)
        for layer in layers:
            hidden = self._pooled_layer(layer, hidden, windows, has_memory, memory)
            outputs = self._kept(outputs, hidden)
            if layer in self.sums:
                self.sums[layer].append(self._sum(hidden, windows))
        return outputs

    def _pooled_layer(self, layer, hidden, windows, has_memory, memory):
        name, block = str(layer), self.model.h[layer]
        if layer not in self.model.config.insert_layers or memory is None or has_memory is False:
            reads = None
        else:
            reads = block.project_memory(self.recurrence.read(memory))
        if not self._is_linear(block):
            query, key, value = block.project(hidden)
            key, value = self.stretch.extend(name, key, value)
            self._cache(name, key, value)
            attended = self._attend(block, query, key, value, reads, has_memory)
        else:
            query, key, value, _ = block.project_features(hidden, None)
            start = linear_start(block, self.stretch, name, key, value, reads, has_memory)
            attended, state = self.stretch.attend_linearly(query, key, value, start, block.feature_map.floor, windows)
            self._cache(f"linear.{name}", packed(state))
        return block.finish(hidden, attended)

    def _cache(self, name, *tensors):
        self.cache.setdefault(name, []).append(tensors)

    def _sum(self, hidden, windows):
        """(B, W', T, D) -> (B, W', D) float32 over the places that hold tokens, earlier calls' tokens included."""
        tokens = ~self.stretch.pads(hidden.shape[2])[:, windows]
        return (widen(hidden) * tokens.to(hidden.device)[..., None]).sum(dim=2)

    def _means(self, windows=slice(None)):
        """(B, W', p, D) raw memory after each of the windows, as if each were full."""
        each = [torch.cat(sums, dim=1)[:, windows] for sums in self.sums.values()]
        return self._with_earlier(torch.stack(each, dim=2)) / self.stretch.window

    def _with_earlier(self, sums):
        earlier = self.stretch.state.window.get("pooled")
        return sums if earlier is None else sums + earlier[:, None]

    def _shifted(self, means):
        """(B, W, p, D) after each window -> before each window; None if no window has memory."""
        if self.has_memory is False:
            return None
        before = self.stretch.state.memory.get("pooled")
        before = torch.zeros_like(means[:, 0]) if before is None else before
        return torch.cat((before[:, None], means[:, :-1]), dim=1)

    def _keep(self):
        """Leave the memory after the last full window, and sums and caches of the unfinished one."""
        stretch, means = self.stretch, self._means()
        self._leave("pooled", lambda: means)
        if any(stretch.filled):
            self.window["pooled"] = stretch.unfinished_sums(means * stretch.window)
            for name, pieces in self.cache.items():
                whole = (torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True))
                self.window[name] = (stretch.unfinished if name.isdigit() else stretch.unfinished_sums)(*whole)


def packed(state: LinearState) -> Tensor:
    """S (..., k, d) and z (..., k) -> (..., k, d + 1)."""
    return torch.cat((state[0], state[1][..., None]), dim=-1)


def linear_start(
    block: RecurGPT2Block,
    stretch: FreshWindows,
    name: str,
    key: Tensor,
    value: Tensor,
    memory: KeyValue | None,
    has_memory: bool | Tensor,
) -> LinearState | None:
    """(S, z) before the first of each window's tokens, (B, W, H, k, d) and (B, W, H, k); None for zeros.

    Args:
        key, value: features (B, W, H, T, k) and values (B, W, H, T, d) of the windows' tokens.
        memory: keys and values (B, W, H, M, d), which enter the sums first.
        has_memory: as `reads` tells it.
    """
    start = stretch.sums(name)
    if start is None and memory is not None and has_memory is not False:
        start = _slots(block, memory, has_memory)
    if stretch.fresh and block.state_decay is not None:
        start = _carried(block, stretch, name, key, value, start)
    return None if start is None else (start[..., :-1], start[..., -1])


def _slots(block, memory, has_memory):
    """Sums over memory slots, (B, W, H, k, d + 1)."""
    key, value = (tensor.flatten(0, 1) for tensor in memory)
    mask = None if has_memory is True else has_memory[:, None].to(key.device)
    state = absorb(block.feature_map(key), value, mask=mask)
    return packed(state).unflatten(0, memory[0].shape[:2])


def _carried(block, stretch, name, key, value, slots):
    """The sums that each window begins with, where they are carried: (B, W, H, k, d + 1).

    A window begins with the decayed sums that the one before ended with, and its memory slots.
    """
    has_memory = stretch.has_memory.to(key.device)[:, :, None, None, None]
    rows, windows = key.shape[:2]
    before = stretch.state.memory.get(f"linear.{name}")
    if before is None and windows == 1:
        return slots
    own = packed(absorb(key.flatten(0, 1), value.flatten(0, 1))).unflatten(0, (rows, windows)) if windows > 1 else None
    decay = widen(block.state_decay).sigmoid()[:, None, None]
    before = torch.zeros_like(own[:, 0]) if before is None else before
    starts = []
    for window in range(windows):
        start = decay * before * has_memory[:, window]
        start = start if slots is None else start + slots[:, window]
        starts.append(start)
        before = start if own is None else start + own[:, window]
    return torch.stack(starts, dim=1)
