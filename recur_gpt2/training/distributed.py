"""Several processes that train one model together, each on documents of its own: what they exchange and agree on.

`torchrun` or `accelerate launch` starts them. One process alone is the common case; then nothing is exchanged. Methods
are collective: every process calls each of them, in the same order. Not for what is exchanged, which trainer.py,
checkpoints.py and comparison.py know.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState
from torch import Tensor, distributed, nn
from torch.distributed import ReduceOp

from ..errors import InputError

# The others wait while the main process tokenises or writes; one that dies is noticed by what started them.
PATIENCE = timedelta(days=1)
BUCKET = 2**24  # elements that are exchanged at a time: few exchanges, and little memory beside the gradients


class ElsewhereError(InputError):
    """Another process refuses to go on. It says why itself, so that one sentence is printed and not one a process."""


class Processes:
    """This process among those that train together.

    Attributes:
        index, count: its number, from 0 on, and how many there are.
        is_main: whether it is the one that writes files, prints and evaluates.
        device: where it computes and what it exchanges lies.
    """

    def __init__(self, device: str = "auto"):
        """`device`: "auto", "cpu" or "cuda"."""
        on_cpu = device == "cpu" or not torch.cuda.is_available()
        state = PartialState(cpu=on_cpu, timeout=PATIENCE)
        self.index, self.count = state.process_index, state.num_processes
        self.is_main = self.index == 0
        self.device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """A block that all go on from, or none: where it raises InputError in one process, all of them stop.

        Raises:
            InputError: as the block raised it, in the first process of those in which it did.
            ElsewhereError: in all other processes.
        """
        failure = None
        try:
            yield
        except InputError as error:
            if self.count == 1:
                raise
            failure = error
        first = self._reduce(self.count if failure is None else self.index, ReduceOp.MIN)
        if failure is not None and first == self.index:
            raise failure
        if first < self.count:
            raise ElsewhereError(f"process {int(first)} of {self.count} cannot go on; its own message says why")

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """As `agreeing`, and the main process is through with the block before the others begin it.

        What it leaves in a cache they find there, and what is wrong with the input is said once.
        """
        for turn in (self.is_main, not self.is_main):
            with self.agreeing():
                if turn:
                    yield

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return self._reduce(bool(flag), ReduceOp.MAX) > 0

    def sum(self, number: float) -> float:
        return self._reduce(number, ReduceOp.SUM)

    def gather(self, tensor: Tensor) -> Tensor:
        """(...) of the same shape in each process -> (processes, ...)."""
        if self.count == 1:
            return tensor[None]
        sent = tensor.to(self.device).contiguous()
        received = [torch.empty_like(sent) for _ in range(self.count)]
        distributed.all_gather(received, sent)
        return torch.stack(received).to(tensor.device)

    def share_parameters(self, model: nn.Module) -> None:
        """Give the model the main process's parameters: what is drawn at random would else differ."""
        if self.count > 1:
            for parameter in model.parameters():
                distributed.broadcast(parameter.data, src=0)

    def sum_gradients(self, model: nn.Module) -> None:
        """Add up the gradients of all processes. A parameter that has one in none of them is left without.

        Not DistributedDataParallel, which takes means where losses are sums over unequal numbers of tokens, and
        waits for the gradients of what only the carried state depends on: nobody asks for these.
        """
        if self.count == 1:
            return
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        made = torch.tensor([parameter.grad is not None for parameter in parameters], device=self.device).int()
        distributed.all_reduce(made)
        bucket, size = [], 0
        for parameter, processes in zip(parameters, made.tolist(), strict=True):
            if not processes:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if bucket and size + parameter.numel() > BUCKET:
                _sum_together(bucket)
                bucket, size = [], 0
            bucket.append(parameter.grad)
            size += parameter.numel()
        if bucket:
            _sum_together(bucket)

    def leave(self) -> None:
        """Exchange nothing from here on, so that each may end when it likes."""
        leave()

    def _reduce(self, number, operation):
        if self.count == 1:
            return number
        tensor = torch.tensor(number, dtype=torch.float64, device=self.device)
        distributed.all_reduce(tensor, operation)
        return tensor.item()


def leave() -> None:
    """End the exchange between processes, if there is any. One that ends without may be aborted by its threads."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _sum_together(gradients: list[Tensor]) -> None:
    """Sum tensors over the processes, in place, in one exchange."""
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))
