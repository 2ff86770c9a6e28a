"""A stretch of windows through the layers, in the order that the recurrence allows.

B rows, W windows, T tokens a window, D width, H heads, M slots, d = D / H, p = len(pool_layers).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .attention import KeyValue
from .reading import FreshWindows
from .recurrence import widen

if TYPE_CHECKING:
    from .modeling import RecurGPT2Model


class LayerWalk:
    """A layer's memory is made from that layer itself: all windows pass one layer, then the next one.

    Attributes:
        memory, window: what the stretch leaves, in RecurState's terms; complete after `run`.
    """

    def __init__(self, model: RecurGPT2Model, stretch: FreshWindows, *, every_layer: bool):
        """`every_layer`: keep the output of each layer, not of the last one alone."""
        self.model, self.stretch, self.every_layer = model, stretch, every_layer
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
        query, key, value = block.project(hidden)
        key, value = self.stretch.extend(name, key, value)
        memory = self._memory(name, key, value) if name in self.model.recurrence else None
        if any(self.stretch.filled):
            self.window[name] = self.stretch.unfinished(key, value)
        attended = self.stretch.attend(query, key, value, memory, self.has_memory, **block.attention_options)
        return block.finish(hidden, attended)

    def _memory(self, name, key, value) -> KeyValue | None:
        """What each window reads, (B, W, H, M, d); keeps what the last one leaves."""
        recurrence, stretch = self.model.recurrence[name], self.stretch
        before = stretch.state.memory.get(name)
        written = None
        if any(stretch.completed):
            written = recurrence.write(key, value, before, stretch.has_memory)
            self.memory[name] = stretch.after_completed(written, before)
        elif before is not None:
            self.memory[name] = before
        if self.has_memory is False:
            return None
        first = recurrence.empty(len(key), like=key) if before is None else before
        raw = first[:, None]
        if key.shape[1] > 1:
            raw = torch.cat((raw.to(key.dtype), written[:, :-1]), dim=1)
        return recurrence.read(raw)


class PooledWalk(LayerWalk):
    """Memory is pooled from `pool_layers` (Yoshida et al. 2020).

    Windows wait for each other only in the band of layers from the first insertion to the last pooling. Below it and
    above it, and everywhere if all poolings lie below all insertions, they pass the layers together.
    """

    def __init__(self, model: RecurGPT2Model, stretch: FreshWindows, *, every_layer: bool):
        super().__init__(model, stretch, every_layer=every_layer)
        self.recurrence = model.recurrence["pooled"]
        self.sums: dict[int, list[Tensor]] = {layer: [] for layer in model.config.pool_layers}
        self.cache: dict[str, list[KeyValue]] = {}

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
            hidden = self._pooled_layer(layer, hidden, has_memory, memory)
            outputs = self._kept(outputs, hidden)
            if layer in self.sums:
                self.sums[layer].append(self._sum(hidden, windows))
        return outputs

    def _pooled_layer(self, layer, hidden, has_memory, memory):
        name, block = str(layer), self.model.h[layer]
        query, key, value = block.project(hidden)
        key, value = self.stretch.extend(name, key, value)
        self.cache.setdefault(name, []).append((key, value))
        if layer not in self.model.config.insert_layers or memory is None or has_memory is False:
            reads = None
        else:
            reads = block.project_memory(self.recurrence.read(memory))
        attended = self.stretch.attend(query, key, value, reads, has_memory, **block.attention_options)
        return block.finish(hidden, attended)

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
        stretch, before = self.stretch, self.stretch.state.memory.get("pooled")
        means = self._means()
        if any(stretch.completed):
            self.memory["pooled"] = stretch.after_completed(means, before)
        elif before is not None:
            self.memory["pooled"] = before
        if any(stretch.filled):
            self.window["pooled"] = stretch.unfinished_sum(means * stretch.window)
            for name, pieces in self.cache.items():
                key, value = (torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True))
                self.window[name] = stretch.unfinished(key, value)
