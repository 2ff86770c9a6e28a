"""A block of windows through the layers, in the order that the recurrence allows.

B rows, W windows, T tokens a window, D width, H heads, M slots, d = D / H, p = len(pool_layers).
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from ..utils.tensors import widen
from .attention_layers import attention_of
from .attention_layers.softmax import AttentionHook
from .window_memory import GivenMemory, OwnMemory, leave
from .windows import NewWindows

# Calls its first argument, a layer as a pure function of tensors (or None), with the others -> a tuple of tensors.
CallLayer = Callable[..., tuple[Tensor, ...]]


class LayerSchedule:
    """Each layer makes its own memory: all windows pass one layer, then the next one.

    Attributes:
        memory, window: what the windows leave, in RecurState's terms; complete after `run`.
    """

    def __init__(
        self,
        model: nn.Module,
        windows: NewWindows,
        *,
        depth: int,
        every_layer: bool,
        hook: AttentionHook | None = None,
        call_layer: CallLayer | None = None,
    ):
        """
        Args:
            model: a RecurGPT2Model.
            depth: layers to run.
            every_layer: keep the output of each layer, not of the last one alone.
            hook: run softmax attention in all layers, and show it what they attend to.
            call_layer: calls each layer in place of us, and may do so again later.
        """
        self.model, self.windows, self.hook, self.call_layer = model, windows, hook, call_layer
        self.depth, self.every_layer = depth, every_layer
        self.memory: dict[str, Tensor] = {}
        self.window: dict[str, Tensor] = {}

    def run(self, hidden: Tensor) -> list[Tensor]:
        """(B, W, T, D) embeddings -> the output of each layer, or of the last one."""
        outputs = []
        for layer in range(self.depth):
            block = self.model.h[layer]
            called_again = self._is_called_again(block)
            hidden = self._called_layer(layer, hidden) if called_again else block(partial(self._layer, layer), hidden)
            outputs = self._kept(outputs, hidden)
        return outputs

    def _is_called_again(self, block):
        """Whether a layer may run again later: through `call_layer`, or by transformers' own gradient checkpointing."""
        checkpoints = block.gradient_checkpointing and block.training and self.hook is None
        return self.call_layer is not None or checkpoints

    def _layer(self, layer, hidden):
        name, block = str(layer), self.model.h[layer]
        carries = block.state_decay is not None
        memory = OwnMemory(self.windows, self.model.recurrence.get(name), name, self.memory, carries=carries)
        attended, kept = attention_of(block, self.hook).prefill(hidden, self.windows, memory)
        self.window |= self.windows.unfinished(kept)
        del kept, memory  # before what follows attention, which takes the most memory
        return block.finish(hidden, attended)

    def _called_layer(self, layer, hidden):
        """`_layer` as a function of its input and of the layer's memory, whose results are all that it leaves."""
        unfinished: list[str] = []
        name, before, alone = str(layer), self.windows.state.memory, self._alone()
        own = [] if self.model.recurrence.get(name) is None else [name]
        own += [f"linear.{name}"] if self.model.h[layer].state_decay is not None else []

        def run(hidden, *memory):
            schedule = alone._alone()
            given = {name: each for name, each in zip(own, memory, strict=True) if each is not None}
            schedule.windows = alone.windows.with_memory(given)
            hidden = schedule._layer(layer, hidden)
            unfinished[:] = schedule.window
            return hidden, *map(schedule.memory.get, own), *schedule.window.values()

        hidden, *after = (self.call_layer or self.model.h[layer])(run, hidden, *map(before.get, own))
        self.memory |= {name: each for name, each in zip(own, after, strict=False) if each is not None}
        self.window |= zip(unfinished, after[len(own) :], strict=True)
        return hidden

    def _alone(self):
        """A schedule of its own: whoever keeps a layer's function must not keep what this one leaves."""
        schedule = copy(self)
        schedule.memory, schedule.window = {}, {}
        return schedule

    def _kept(self, outputs, hidden):
        return [*outputs, hidden] if self.every_layer else [hidden]


class PooledSchedule(LayerSchedule):
    """Memory is pooled from `pool_layers` (Yoshida et al. 2020).

    Windows wait for each other only in the band of layers from the first insertion to the last pooling. Below it and
    above it, and everywhere if all poolings lie below all insertions, they pass the layers together.
    """

    def __init__(self, model: nn.Module, windows: NewWindows, *, depth: int, every_layer: bool, **options):
        # Memory is pooled above what is asked for: run on, and keep what was asked for.
        further = max(model.config.pool_layers) >= depth
        super().__init__(model, windows, depth=depth, every_layer=every_layer or further, **options)
        self.recurrence = model.recurrence.get("pooled")
        self.sums: dict[int, list[Tensor]] = {layer: [] for layer in model.config.pool_layers}
        self.parts: dict[str, list[tuple[Tensor, ...]]] = {}

    def run(self, hidden: Tensor) -> list[Tensor]:
        config = self.model.config
        first, top = min(config.insert_layers), max(config.pool_layers) + 1
        outputs = self._span(range(min(first, top)), hidden, self.windows, None)
        below = outputs[-1] if outputs else hidden
        if first < top:
            outputs += self._band(range(first, top), below)
        memory = self._shifted(self._means())
        rest = outputs[-1] if outputs else hidden
        outputs += self._span(range(top, self.depth), rest, self.windows, memory)
        self._leave()
        return outputs[: self.depth]

    def _band(self, layers, hidden):
        each = []
        before = self.windows.state.memory.get("pooled")
        for window in range(hidden.shape[1]):
            here = slice(window, window + 1)
            memory = None if before is None else before[:, None]
            each.append(self._span(layers, hidden[:, here], self.windows.part(here), memory))
            before = self._means(here)[:, 0]
        return [torch.cat(windows, dim=1) for windows in zip(*each, strict=True)]

    def _span(self, layers, hidden, windows, memory):
        """Some layers over some windows. memory: (B, W', p, D) raw memory that these windows read, or None."""
        outputs = []
        for layer in layers:
            block = self.model.h[layer]
            call_layer, schedule = self.call_layer or block, self._alone() if self._is_called_again(block) else self
            sizes: dict[str, int] = {}
            hidden, *kept = call_layer(partial(schedule._pooled_layer, layer, windows, sizes), hidden, memory)
            for name, size in sizes.items():
                self.parts.setdefault(name, []).append(tuple(kept[:size]))
                del kept[:size]
            outputs = self._kept(outputs, hidden)
            if layer in self.sums:
                self.sums[layer].append(self._sum(hidden, windows))
        return outputs

    def _alone(self):
        schedule = super()._alone()
        schedule.sums, schedule.parts = {}, {}
        return schedule

    def _pooled_layer(self, layer, windows, sizes, hidden, memory):
        """-> layer output, and what unfinished windows keep: so many tensors, by name, as `sizes` is told."""
        block, slots = self.model.h[layer], 0
        if layer in self.model.config.insert_layers:
            slots = self.recurrence.slots
        if not slots or memory is None or windows.reads is False:
            given = GivenMemory(None, slots)
        else:
            given = GivenMemory(block.project_memory(self.recurrence.read(memory)), slots)
        attended, kept = attention_of(block, self.hook).prefill(hidden, windows, given)
        sizes |= {name: len(tensors) for name, tensors in kept.items()}
        return block.finish(hidden, attended), *chain.from_iterable(kept.values())

    def _sum(self, hidden, windows):
        """(B, W', T, D) -> (B, W', D) float32 over the positions that hold tokens, earlier calls' tokens included."""
        tokens = ~windows.pads(hidden.shape[2])
        return (widen(hidden) * tokens.to(hidden.device)[..., None]).sum(dim=2)

    def _means(self, windows=slice(None)):
        """(B, W', p, D) raw memory after each of the windows, as if each were full."""
        each = [torch.cat(sums, dim=1)[:, windows] for sums in self.sums.values()]
        return self._with_earlier(torch.stack(each, dim=2)) / self.windows.window

    def _with_earlier(self, sums):
        earlier = self.windows.state.window.get("pooled")
        return sums if earlier is None else sums + earlier[:, None]

    def _shifted(self, means):
        """(B, W, p, D) after each window -> before each window; None if no window has memory."""
        if self.windows.reads is False:
            return None
        before = self.windows.state.memory.get("pooled")
        before = torch.zeros_like(means[:, 0]) if before is None else before
        return torch.cat((before[:, None], means[:, :-1]), dim=1)

    def _leave(self):
        """Leave the memory after the last full window, and what the unfinished one keeps."""
        windows, means = self.windows, self._means()
        leave(self.memory, "pooled", windows, lambda: means)
        if windows.has_unfinished:
            self.window["pooled"] = windows.unfinished_sums(means * windows.window)
            whole = {
                name: tuple(torch.cat(each, dim=1) for each in zip(*parts, strict=True))
                for name, parts in self.parts.items()
            }
            self.window |= windows.unfinished(whole)
