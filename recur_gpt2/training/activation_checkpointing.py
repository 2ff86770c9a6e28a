"""Backpropagation through a segment that keeps a few states and computes everything else again.

torch.utils.checkpoint keeps every state, and for each block a graph of placeholders of a quarter of a megabyte; and it
makes the gradients of the loss's head twice. Here a block runs without a graph first. Before its turn in the backward
pass, what its layers give is noted; they take that from the notes, and run once more, one at a time, as their gradients
come back: so that one layer of one block is saved at a time. Not for what a block computes: that is the caller's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..models.schedule import CallLayer
from ..models.state import RecurState

KEPT = 8  # states of a segment that are kept; those between them are made once more, by reading on from one
# Blocks that are noted at a time: the last of a forward pass. Each other one is read once more before its turn, since
# notes of all would grow with their number.
NOTED = 2


class Block(Protocol):
    """Some windows: two pure functions of what they are given, of the parameters and of random numbers."""

    def read(self, state: RecurState, call_layer: CallLayer | None = None) -> tuple[tuple[Tensor, ...], RecurState]:
        """The state before -> what the loss is made from, and the state after. Layers are called through `call_layer`,
        if given."""

    def loss(self, *outputs: Tensor) -> Tensor:
        """What `read` gave -> ()."""

    def loss_backward(self, grad_total: Tensor, *outputs: Tensor) -> list[Tensor | None]:
        """The backward pass of `loss`: adds to its parameters' gradients -> those of what `read` gave, if any."""


def recomputed(blocks: Sequence[Block], state: RecurState, parameters: Sequence[Tensor]) -> tuple[Tensor, RecurState]:
    """Read blocks one after another and sum their losses; the same as without recomputation, gradients included.

    As with PyTorch's own reentrant checkpointing, the backward pass must be `backward()` without `inputs`: it adds to
    the parameters' `.grad` as it goes, since a second set of gradients would cost as much memory as the weights.

    Args:
        state: before the first block, with no unfinished windows.
        parameters: all that may get a gradient.

    Returns:
        The sum (), and the state after the last block.
    """
    parameters = [each for each in parameters if each.requires_grad]
    whole = _Pass(blocks, parameters)
    # The parameter is there for the graph alone: a result that nothing asks a gradient of would have no backward pass.
    total, *memory = _Recomputed.apply(whole, state, parameters[0], *state.memory.values())
    return total, replace(whole.after, memory=dict(zip(whole.names, memory, strict=True)))


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, whole, state, *inputs):
        ctx.whole = whole
        ctx.set_materialize_grads(False)
        return whole.forward(state)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, *grad_memory):
        return None, None, None, *ctx.whole.backward(grad_total, grad_memory)


class _Pass:
    """One pass through the blocks and back.

    Attributes:
        after, names: the state after the last block without its memory, and the names of that. The memory itself is
            of the graph that holds this pass, and would never be freed if this pass held it.
    """

    def __init__(self, blocks, parameters):
        self.blocks, self.parameters = blocks, parameters
        self.device = parameters[0].device
        self.spacing = -(-len(blocks) // KEPT)
        self.kept: list[tuple[RecurState, tuple]] = []  # every `spacing` blocks, state and random state before them
        self.notes: dict[int, deque] = {}  # of some blocks, by their numbers: for each layer (random state, outputs)
        kind = self.device.type
        # Without autocast's cache: it would hold all weights in 16 bit, and a layer needs its own once.
        self.autocast = {
            "device_type": kind,
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
            "cache_enabled": False,
        }

    def forward(self, state):
        """Without a graph -> the summed loss and the last state's memory, one tensor a name."""
        total = 0.0
        with torch.autocast(**self.autocast):
            for number, block in enumerate(self.blocks):
                if number % self.spacing == 0:
                    self.kept.append((state, self._random()))
                outputs, state = self._read(number, state, note=number >= len(self.blocks) - NOTED)
                total = total + block.loss(*outputs)
        self.after, self.names = replace(state, memory={}), list(state.memory)
        return total, *state.memory.values()

    def backward(self, grad_total, grad_memory):
        """Gradients of the total and of the last state's memory -> of the first state's; parameters get theirs."""
        if not self.kept:
            raise RuntimeError("a recomputed segment frees its states in the backward pass: it cannot go twice")
        if not _is_backward():
            raise RuntimeError("a recomputed segment adds to .grad: call backward() without inputs, not autograd.grad")
        grad_memory = dict(zip(self.names, grad_memory, strict=True))
        with self._gradients_in_one_place():
            while self.kept:
                section = self._section()
                while section:
                    grad_memory = self._through(*section.pop(), grad_total, grad_memory)
        return tuple(grad_memory.values())

    @contextmanager
    def _gradients_in_one_place(self):
        """Gradients to add to, made before anything large: made one by one between the blocks' tensors, they would tear
        the heap. Parameters that took no part have none afterwards, as ever."""
        new = [parameter for parameter in self.parameters if parameter.grad is None]
        reached = set()
        hooks = [each.register_hook(lambda _, each=each: reached.add(id(each))) for each in new]
        for parameter in new:
            parameter.grad = torch.zeros_like(parameter)
        yield
        for hook in hooks:
            hook.remove()
        for parameter in new:  # the head's is added to without a hook
            if id(parameter) not in reached and not parameter.grad.any():
                parameter.grad = None

    def _read(self, number, state, *, note):
        """A block without a graph -> what its loss is made from, and the state after."""
        if not note:
            return self.blocks[number].read(state)
        notes = self.notes[number] = deque()

        def call_layer(layer, *inputs):
            random = self._random()
            outputs = layer(*inputs)
            notes.append((random, outputs))
            return outputs

        return self.blocks[number].read(state, call_layer)

    def _section(self):
        """The blocks from the last kept state on: number, state and random state before each."""
        state, random = self.kept.pop()
        first = len(self.kept) * self.spacing
        numbers = range(first, min(first + self.spacing, len(self.blocks)))
        section = [(first, state, random)]
        with self._as_forward(random), torch.no_grad():
            for before, number in pairwise(numbers):
                _, state = self._read(before, state, note=number == numbers[-1] and before not in self.notes)
                section.append((number, state, self._random()))
        return section

    def _through(self, number, state, random, grad_total, grad_memory):
        """Back through one block -> gradients of the memory before it, by name."""
        given = {name: tensor.detach().requires_grad_() for name, tensor in state.memory.items()}
        if number not in self.notes:
            with self._as_forward(random), torch.no_grad():
                self._read(number, state, note=True)
        block, notes = self.blocks[number], self.notes.pop(number)

        def call_layer(layer, *inputs):
            return _Layer.apply(self, layer, *notes.popleft(), self.parameters[0], *inputs)

        with self._as_forward(random), torch.enable_grad():
            outputs, after = block.read(replace(state, memory=given), call_layer)
            gradients = [] if grad_total is None else block.loss_backward(grad_total, *outputs)
            made = list(zip(outputs, gradients, strict=False))
        made += [(after.memory[name], gradient) for name, gradient in grad_memory.items()]
        del outputs, after
        _backward(made)
        return {name: tensor.grad for name, tensor in given.items()}

    def through_layer(self, layer, random, inputs, gradients):
        """Back through one layer: its inputs, and gradients of its outputs -> gradients of its inputs."""
        inputs = [None if each is None else each.detach().requires_grad_(each.requires_grad) for each in inputs]
        with self._as_forward(random), torch.enable_grad():
            outputs = layer(*inputs)
        _backward(zip(outputs, gradients, strict=True))
        return [None if each is None else each.grad for each in inputs]

    def _random(self):
        return torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None

    @contextmanager
    def _as_forward(self, random):
        """Numbers are drawn, and products run, as they did in the forward pass."""
        on_cpu, on_gpu = random
        with torch.random.fork_rng([self.device] if on_gpu is not None else []), torch.autocast(**self.autocast):
            torch.set_rng_state(on_cpu)
            if on_gpu is not None:
                torch.cuda.set_rng_state(on_gpu, self.device)
            yield


class _Layer(torch.autograd.Function):
    """A layer that was run before: its outputs are known, and it runs again as their gradients come back."""

    @staticmethod
    def forward(ctx, whole, layer, random, outputs, parameter, *inputs):
        # The parameter is there for the graph alone, as in `recomputed`.
        ctx.whole, ctx.layer, ctx.random = whole, layer, random
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        found = ctx.whole.through_layer(ctx.layer, ctx.random, ctx.saved_tensors, gradients)
        return None, None, None, None, None, *found


def _is_backward():
    """Whether this is `backward()` rather than `autograd.grad`; True where this PyTorch does not tell (private, 2.11 to
    2.14 do), since the check only spares a user wrong gradients."""
    tell = getattr(torch.autograd, "_is_checkpoint_valid", None)
    return tell is None or tell()


def _backward(made):
    """The backward pass of tensors with their gradients, where there are such."""
    made = [(tensor, gradient) for tensor, gradient in made if tensor.requires_grad and gradient is not None]
    if made:
        torch.autograd.backward(*zip(*made, strict=True))
