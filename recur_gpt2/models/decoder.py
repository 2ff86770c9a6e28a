"""One token of each row at a time, in buffers that are written in place: what `generate` steps through.

The same arithmetic as `RecurGPT2Model.forward` with one token, without its bookkeeping. A `Decoder` is changed by its
steps, as a RecurState never is; `state()` copies one out. B rows, D model width, p = len(pool_layers).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..utils.tensors import product_type, widen
from .attention_layers import attention_of
from .attention_layers.positions import Positions
from .pointer import POINTER
from .state import Origin, RecurState


class Decoder:
    """Rows of documents, each in its own place, read on token by token.

    Attributes:
        filled, windows: B numbers each, as RecurState's.
    """

    def __init__(self, model: nn.Module, state: RecurState):
        """
        Args:
            state: where the rows go on from.
        """
        self.model, self.config, rows = model, model.config, state.batch_size
        self.device = model.wte.weight.device
        self.dtype = product_type(model.wte.weight)
        like = model.wte.weight.new_empty(0, dtype=self.dtype)
        self.layers = [self._layer(layer, rows, like) for layer in range(self.config.n_layer)]
        self.sums = widen(like).new_zeros(rows, len(self.config.pool_layers), self.config.n_embd)
        self.pointer = model.recurrence.pointer
        width = 0 if self.pointer is None else self.pointer.width + 1
        self.positions = widen(like).new_zeros(rows, self.config.window, width)
        self.load(state)

    def _layer(self, layer, rows, like):
        block, config = self.model.h[layer], self.config
        slots = config.memory_slots if layer in config.insert_layers else 0
        recurrence = self.model.recurrence.get(block.name)
        last = None if recurrence is None else recurrence.last_positions(config.window)
        attention = attention_of(block)
        attention.allocate(rows, config.window, slots, last, like)
        return attention

    @torch.no_grad()
    def load(self, state: RecurState) -> None:
        """Take over a state of as many rows; it is copied. Raises InputError if another model left it."""
        state = state.checked_for(self.model).to(self.device, self.dtype)
        self.filled, self.windows = state.filled.tolist(), state.windows.tolist()
        self.memory = {name: tensor.clone() for name, tensor in state.memory.items()}
        rows = torch.tensor([row for row, windows in enumerate(self.windows) if windows], device=self.device)
        nothing = torch.tensor([row for row, windows in enumerate(self.windows) if not windows], device=self.device)
        for layer in self.layers:
            if len(nothing):
                layer.begin(nothing.long(), None, None)
        if len(rows):
            self._begin(rows)
        if any(self.filled):
            for each in self.layers:
                each.load(state.window, self.filled)
            if "pooled" in state.window:
                self.sums.copy_(state.window["pooled"])
            if POINTER in state.window:
                self.positions[:, : max(self.filled)] = state.window[POINTER]
        else:
            self.sums.zero_()

    @torch.no_grad()
    def state(self) -> RecurState:
        """A copy of where the rows are."""
        window = {}
        if any(self.filled):
            for each in self.layers:
                window |= each.save(self.filled)
            if self.config.pool_layers:
                window["pooled"] = self.sums.clone()
            if self.pointer is not None:
                inside = torch.arange(max(self.filled)) < torch.tensor(self.filled)[:, None]
                window[POINTER] = self.positions[:, : max(self.filled)] * inside.to(self.device)[..., None]
        counters = torch.tensor(self.windows), torch.tensor(self.filled)
        memory = {name: tensor.clone() for name, tensor in self.memory.items()}
        return RecurState(*counters, memory, window, Origin.of(self.model))

    @torch.no_grad()
    def step(self, input_ids: Tensor) -> Tensor:
        """Read one token of each row.

        Args:
            input_ids: (B, 1) int64.

        Returns:
            Hidden states (B, 1, D) after the final layer norm.
        """
        model, positions = self.model, Positions(self.filled, [windows > 0 for windows in self.windows], self.device)
        hidden = model.wte(input_ids) + model.wpe(self._position_ids(positions))
        pooled = {}
        for layer, (block, each) in enumerate(zip(model.h, self.layers, strict=True)):
            hidden = block.finish(hidden, each.step(hidden, positions))
            if layer in self.config.pool_layers:
                pooled[layer] = widen(hidden[:, 0])
        if pooled:
            self.sums += torch.stack([pooled[layer] for layer in self.config.pool_layers], dim=1)
        hidden = model.ln_f(hidden)
        if self.pointer is not None:
            positions.put(self.positions, 0, self.pointer.positions(hidden, input_ids)[:, 0])
        self._advance()
        return hidden

    @property
    def slots(self) -> Tensor | None:
        """(B, N, w + 1), what the rows' next tokens may point at; None for nothing."""
        return self.memory.get(POINTER) if any(self.windows) else None

    @property
    def fills_a_window(self) -> bool:
        """Whether the next step does, in some row."""
        return max(self.filled) == self.config.window - 1

    @torch.no_grad()
    def reorder(self, rows: Tensor) -> None:
        """Row b goes on as row `rows[b]` (B,) was."""
        order = rows.tolist()
        if order == list(range(len(order))):
            return
        rows = rows.to(self.device)
        for buffer in self._buffers():
            buffer.copy_(buffer.index_select(0, rows))
        self.filled, self.windows = ([numbers[row] for row in order] for numbers in (self.filled, self.windows))

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(each.nbytes for each in self._buffers())

    def _buffers(self):
        """All that is kept, rows first."""
        return [
            *(each for layer in self.layers for each in layer.buffers),
            self.sums,
            self.positions,
            *self.memory.values(),
        ]

    def _position_ids(self, positions):
        """(B, 1) position ids, or (1, 1) where all rows are alike."""
        offset = self.config.position_offset
        numbers = [n + offset * has for n, has in zip(positions.filled, positions.has_memory, strict=True)]
        return torch.tensor(numbers[:1] if positions.alike else numbers, device=self.device)[:, None]

    def _advance(self):
        """Count the token, and turn over the windows that it has filled."""
        self.filled = [n + 1 for n in self.filled]
        full = [row for row, n in enumerate(self.filled) if n == self.config.window]
        if not full:
            return
        rows = torch.tensor(full, device=self.device)
        self._leave(rows, torch.tensor([[self.windows[row] > 0] for row in full], device=self.device))
        for row in full:
            self.filled[row], self.windows[row] = 0, self.windows[row] + 1
        self._begin(rows)

    def _leave(self, rows, had_memory):
        """Write the memory of full windows."""
        for layer, each in enumerate(self.layers):
            name = str(layer)
            recurrence = self.model.recurrence.get(name)
            if recurrence is not None:
                before = self.memory[name][rows] if name in self.memory else None
                left = recurrence.write(*each.last_positions(rows), before, had_memory)
                self._keep(name, rows, left[:, 0])
            if each.block.state_decay is not None:
                self._keep(f"linear.{name}", rows, each.total(rows))
        if self.config.pool_layers:
            self._keep("pooled", rows, self.sums[rows] / self.config.window)
            self.sums[rows] = 0
        if self.pointer is not None:
            before = self.memory[POINTER] if POINTER in self.memory else self.pointer.empty(self.positions)
            self._keep(POINTER, rows, self.pointer.written(before[rows], self.positions[rows]))

    def _keep(self, name, rows, values):
        if name not in self.memory:
            self.memory[name] = values.new_zeros(len(self.filled), *values.shape[1:])
        self.memory[name][rows] = values.to(self.memory[name].dtype)

    def _begin(self, rows):
        """New windows of rows that have memory."""
        embeddings = None
        if self.config.pool_layers:
            embeddings = self.model.recurrence.get("pooled").read(self.memory["pooled"][rows])
        for layer, each in enumerate(self.layers):
            name, memory, carried = str(layer), None, None
            recurrence = self.model.recurrence.get(name)
            if recurrence is not None:
                memory = recurrence.read(self.memory[name][rows])
            elif embeddings is not None and layer in self.config.insert_layers:
                memory = each.block.project_memory(embeddings)
            if each.block.state_decay is not None:
                decay = widen(each.block.state_decay).sigmoid()[:, None, None]
                carried = decay * self.memory[f"linear.{name}"][rows]
            each.begin(rows, memory, carried)
