"""A stretch of windows through the layers, in the order that the recurrence allows.

B rows, W windows, T tokens a window, D width, H heads, M slots, d = D / H, p = len(pool_layers).
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial

import torch
from torch import Tensor, nn

from ..ops.softmax import KeyValue
from ..utils.tensors import widen
from .attention_layers.hybrid import NearWindows
from .attention_layers.linear import linear_start, packed
from .block import RecurGPT2Block
from .windows import FreshWindows

Teach = Callable[["RecurGPT2Block", Tensor, Tensor, Tensor | None, bool | Tensor], None]
# Calls its first argument, a layer as a pure function of tensors (or None), with the others -> a tuple of tensors.
RunLayer = Callable[..., tuple[Tensor, ...]]


class LayerWalk:
    """A layer's memory is made from that layer itself: all windows pass one layer, then the next one.

    Attributes:
        memory, window: what the stretch leaves, in RecurState's terms; complete after `run`.
    """

    def __init__(
        self,
        model: nn.Module,
        stretch: FreshWindows,
        *,
        depth: int,
        every_layer: bool,
        teach: Teach | None = None,
        run_layer: RunLayer | None = None,
    ):
        """
        Args:
            depth: layers to read.
            every_layer: keep the output of each layer, not of the last one alone.
            teach: read with softmax attention in all layers, and show this function what those attend to whose own
                attention is linear.
            run_layer: calls each layer in place of us, where all windows are full.
        """
        self.model, self.stretch, self.teach, self.run_layer = model, stretch, teach, run_layer
        self.depth, self.every_layer = depth, every_layer
        self.has_memory = stretch.reads()
        self.memory: dict[str, Tensor] = {}
        self.window: dict[str, Tensor] = {}

    def run(self, hidden: Tensor) -> list[Tensor]:
        """(B, W, T, D) embeddings -> the output of each layer, or of the last one."""
        outputs = []
        for layer in range(self.depth):
            hidden = self._layer(layer, hidden) if self.run_layer is None else self._layer_alone(layer, hidden)
            outputs = self._kept(outputs, hidden)
        return outputs

    def _layer_alone(self, layer, hidden):
        """`_layer` as a function of its input and of the layer's memory, whose results are all that it leaves."""
        name, before, alone = str(layer), self.stretch.state.memory, self._alone()
        own = [name] if name in self.model.recurrence else []
        own += [f"linear.{name}"] if self.model.h[layer].state_decay is not None else []

        def run(hidden, *memory):
            walk = alone._alone()
            given = {name: each for name, each in zip(own, memory, strict=True) if each is not None}
            walk.stretch = alone.stretch.with_memory(given)
            return walk._layer(layer, hidden), *(walk.memory[name] for name in own)

        hidden, *after = self.run_layer(run, hidden, *map(before.get, own))
        self.memory |= zip(own, after, strict=True)
        return hidden

    def _alone(self):
        """A walk of its own: whoever keeps a layer's function must not keep what this walk leaves."""
        walk = copy(self)
        walk.memory, walk.window = {}, {}
        return walk

    def _kept(self, outputs, hidden):
        return [*outputs, hidden] if self.every_layer else [hidden]

    def _layer(self, layer, hidden):
        name, block = str(layer), self.model.h[layer]
        if self._is_linear(block):
            return (self._linear_layer if block.far_gate is None else self._near_layer)(layer, hidden)
        query, key, value = block.project(hidden)
        key, value = self.stretch.extend(name, key, value)
        written = self._write(name, partial(tuple, (key, value)))
        if any(self.stretch.filled):
            self.window[name] = self.stretch.unfinished(key, value)
        memory = self._read(name, written, value)
        attended = self._attend(block, query, key, value, memory, self.has_memory)
        del query, key, value, written, memory  # before what follows attention, which takes the most memory
        return block.finish(hidden, attended)

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

    def _near_layer(self, layer, hidden):
        name, block, stretch = str(layer), self.model.h[layer], self.stretch
        query, key, value = block.project(hidden)
        count = self._tail_length(name)
        written = self._write(name, lambda: stretch.last_positions(name, key, value, count))
        memory = self._read(name, written, value) if stretch.fresh else None  # windows begun have it in front already
        slots = self.model.config.memory_slots if name in self.model.recurrence else 0
        places = NearWindows(block, stretch, name, key, value, memory, self.has_memory, slots=slots, kept=count)
        attended = places.attend(query)
        if block.state_decay is not None:
            self._leave(f"linear.{name}", places.sums_of_all)
        if any(stretch.filled):
            self.window[f"linear.{name}"] = stretch.unfinished_sums(places.sums())
            self.window[f"tail.{name}"] = stretch.unfinished_sums(places.tails())
        return block.finish(hidden, attended)

    def _tail_length(self, name):
        """Positions at a window's end that the recurrence of a layer with linear attention is written from."""
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


def _call(layer, *inputs):
    return layer(*inputs)


class PooledWalk(LayerWalk):
    """Memory is pooled from `pool_layers` (Yoshida et al. 2020).

    Windows wait for each other only in the band of layers from the first insertion to the last pooling. Below it and
    above it, and everywhere if all poolings lie below all insertions, they pass the layers together.
    """

    def __init__(self, model: nn.Module, stretch: FreshWindows, *, depth: int, every_layer: bool, **options):
        # Memory is pooled above what is asked for: read on, and keep what was asked for.
        further = max(model.config.pool_layers) >= depth
        super().__init__(model, stretch, depth=depth, every_layer=every_layer or further, **options)
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
        outputs += self._span(range(top, self.depth), rest, everything, memory)
        self._keep()
        return outputs[: self.depth]

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
        run_layer, walk = (_call, self) if self.run_layer is None else (self.run_layer, self._alone())
        for layer in layers:
            (hidden,) = run_layer(partial(walk._pooled_layer, layer, windows, has_memory), hidden, memory)
            outputs = self._kept(outputs, hidden)
            if layer in self.sums:
                self.sums[layer].append(self._sum(hidden, windows))
        return outputs

    def _alone(self):
        walk = super()._alone()
        walk.sums, walk.cache = {}, {}
        return walk

    def _pooled_layer(self, layer, windows, has_memory, hidden, memory):
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
            del query, key, value
        elif block.far_gate is not None:
            query, key, value = block.project(hidden)
            slots = 0 if reads is None else reads[0].shape[3]
            places = NearWindows(block, self.stretch, name, key, value, reads, has_memory, windows, slots=slots)
            attended = places.attend(query)
            if any(self.stretch.filled):  # they would have to be made
                self._cache(f"linear.{name}", places.sums())
                self._cache(f"tail.{name}", places.tails())
        else:
            query, key, value, _ = block.project_features(hidden, None)
            start = linear_start(block, self.stretch, name, key, value, reads, has_memory)
            attended, state = self.stretch.attend_linearly(query, key, value, start, block.feature_map.floor, windows)
            self._cache(f"linear.{name}", packed(state))
        return (block.finish(hidden, attended),)

    def _cache(self, name, *tensors):
        if any(self.stretch.filled):
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
