"""RecurState: all that crosses a border between two calls, and nothing else.

Every tensor has the batch as its first dimension. A call takes a state and returns a new one; no tensor of a state is
ever changed in place, so a state can be kept, branched from and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple
from weakref import ref

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import InputError
from ..utils.files import atomic_path
from .fingerprint import is_of, model_fingerprint


class Origin(NamedTuple):
    """The RecurGPT2Model that left a state, which the state does not keep alive.

    Attributes:
        model: a weak reference.
        fingerprint: None while the model is being trained, since each step would make another one, or compiled, since
            that is no part of a graph; and of a model without weights.
    """

    model: ref
    fingerprint: str | None

    @classmethod
    def of(cls, model: nn.Module) -> Origin:
        unknown = model.training or torch.compiler.is_compiling() or model.device.type == "meta"
        return cls(ref(model), None if unknown else model_fingerprint(model))


@dataclass(frozen=True, eq=False)
class RecurState:
    """What a model carries from one block of a document to the next, for B rows.

    Attributes:
        windows: (B,) int64 on the CPU, full windows read since the row's document began; a row has memory once
            this is positive.
        filled: (B,) int64 on the CPU, tokens of the window that is not full yet.
        memory: what the last full window left. Without `pool_layers`: {"<layer>": (B, 2, H, pooled + last slots,
            D / H)}, keys and values. With them: {"pooled": (B, len(pool_layers), D)}, mean hidden states. With
            `carry_linear_state` also {"linear.<layer>": (B, H, k, D / H + 1)}, S with z beside it. With
            `pointer_slots` also {"pointer": (B, N, w + 1)}, keys of the last N positions, oldest first, and beside each
            the id of the token that followed it, plus one; zeros where there are fewer.
        window: what is needed inside the window that is not full yet: {"<layer>": (B, 2, H, F, D / H)}, its keys
            and values, zero beyond a row's `filled`, F the largest of them; with `pool_layers` also
            {"pooled": (B, len(pool_layers), D)}, the sums of its hidden states. Layers with linear attention have
            {"linear.<layer>": (B, H, k, D / H + 1)} instead, S with z beside it, and, if they leave memory,
            {"tail.<layer>": (B, 2, H, n, D / H)}, the last n keys and values, aligned to the end, zero in front. With
            `near_tokens` n is at least that many, memory slots count as positions in front, and S and z are without the
            last `near_tokens` positions. With `pointer_slots` also {"pointer": (B, F, w + 1)}, each position's key, and
            its own token's id, plus one.
        origin: the RecurGPT2Model that left it; of a state that was loaded, the fingerprint of that model; None if
            not known. A model refuses a state that another one left.
    """

    windows: Tensor
    filled: Tensor
    memory: dict[str, Tensor] = field(default_factory=dict)
    window: dict[str, Tensor] = field(default_factory=dict)
    origin: Origin | str | None = None

    @classmethod
    def empty(cls, batch_size: int) -> RecurState:
        """The state before a document's first token, for `batch_size` rows."""
        zeros = torch.zeros(batch_size, dtype=torch.int64)
        return cls(windows=zeros, filled=zeros.clone())

    @property
    def batch_size(self) -> int:
        return len(self.windows)

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors hold."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def detach(self) -> RecurState:
        """The same state, cut from the graph that made it."""
        return self._map(Tensor.detach)

    def to(self, *args, **kwargs) -> RecurState:
        """Memory and window moved or cast as by `Tensor.to`; the counters stay on the CPU. Sums (of linear attention,
        of pooling) and what is pointed at are never cast to 16 bit, which would lose what is small, and ids."""

        def cast(group):
            moved = {name: tensor.to(*args, **kwargs) for name, tensor in group.items()}
            return {
                name: group[name].to(each.device, torch.promote_types(each.dtype, torch.float32))
                if _is_wide(name)
                else each
                for name, each in moved.items()
            }

        return replace(self, memory=cast(self.memory), window=cast(self.window))

    def select(self, rows: Tensor | list[int]) -> RecurState:
        """The given rows, in the given order; a row may be left out or repeated."""
        rows = torch.as_tensor(rows)
        picked = self._map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))
        rows = rows.cpu()
        return replace(picked, windows=self.windows[rows], filled=self.filled[rows])._trimmed()

    reorder = select

    def merge(self, rows: Tensor, other: RecurState) -> RecurState:
        """This state with `rows` (B',) replaced by those of `other`, a state of B' rows."""
        windows, filled = self.windows.clone(), self.filled.clone()
        windows[rows], filled[rows] = other.windows, other.filled
        groups = ((getattr(self, name), getattr(other, name)) for name in ("memory", "window"))
        memory, window = (
            {key: _replace_rows(old.get(key), rows, new.get(key), self.batch_size) for key in old | new}
            for old, new in groups
        )
        return RecurState(windows, filled, memory, window, self.origin)._trimmed()

    @classmethod
    def join(cls, states: Sequence[RecurState]) -> RecurState:
        """The rows of all these states, in this order."""
        windows, filled = (torch.cat([getattr(state, name) for state in states]) for name in ("windows", "filled"))
        sizes = [state.batch_size for state in states]
        memory = _join_groups([state.memory for state in states], sizes)
        window = _join_groups([state.window for state in states], sizes)
        return cls(windows, filled, memory, window, states[0].origin)

    def save(self, path: str | Path, beside: dict[str, Tensor] | None = None) -> None:
        """Write the state as one safetensors file, with the fingerprint of its model; whole or not at all.

        Args:
            beside: tensors to keep in the same file, {"group.name": tensor}; `load` does not look at them.
        """
        tensors = self._tensors() | (beside or {})
        tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        fingerprint = self.fingerprint()
        metadata = {"format": "recur_gpt2.models.state"} | ({"model": fingerprint} if fingerprint else {})
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    def fingerprint(self) -> str | None:
        """Of the model that left the state; None if that is not known."""
        if self.origin is None or isinstance(self.origin, str):
            return self.origin
        model = self.origin.model()
        return self.origin.fingerprint if model is None else model_fingerprint(model)

    def checked_for(self, model: nn.Module) -> RecurState:
        """The state, if this model left it.

        Raises:
            InputError: another model left it.
        """
        own = isinstance(self.origin, Origin) and self.origin.model() is model
        fingerprint = None if own else self.fingerprint()
        if fingerprint is not None and not is_of(fingerprint, model):
            raise InputError(
                "the state was left by another model than this one: its configuration or its weights differ; read the "
                "text again, or load the model that left it"
            )
        return self

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> RecurState:
        """Read what `save` wrote.

        Raises:
            InputError: there is no such file, or it is damaged or holds something else.
        """
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except FileNotFoundError:
            raise InputError(f"there is no state file {path}; give one that `save` or --state-out wrote") from None
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} is not a readable state file ({error}); save the state again") from error
        if not {"windows", "filled"} <= tensors.keys():
            raise InputError(f"{path} holds no state of recur_gpt2; give a file that RecurState.save wrote")
        groups = {"memory": {}, "window": {}}
        for name, tensor in tensors.items():
            group, _, key = name.partition(".")
            if group in groups:
                groups[group][key] = tensor
        counters = tensors["windows"].cpu(), tensors["filled"].cpu()
        return cls(*counters, **groups, origin=metadata.get("model"))

    def _trimmed(self) -> RecurState:
        """Unfinished windows no longer than the longest row's, and none at all where no row has any."""
        longest = max(self.filled.tolist(), default=0)
        if not longest:
            return replace(self, window={})
        window = self.window.items()
        return replace(self, window={k: v[..., :longest, :] if k.isdigit() or k == "pointer" else v for k, v in window})

    def _map(self, function: Callable[[Tensor], Tensor]) -> RecurState:
        return replace(
            self,
            memory={key: function(tensor) for key, tensor in self.memory.items()},
            window={key: function(tensor) for key, tensor in self.window.items()},
        )

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"windows": self.windows, "filled": self.filled}
        tensors |= {f"memory.{key}": tensor for key, tensor in self.memory.items()}
        return tensors | {f"window.{key}": tensor for key, tensor in self.window.items()}


def _is_wide(name: str) -> bool:
    return name in ("pooled", "pointer") or name.startswith("linear.")


def _replace_rows(old: Tensor | None, rows: Tensor, new: Tensor | None, batch_size: int) -> Tensor:
    """`old` with the given rows set to `new`; the sizes may differ in unfinished windows, and None stands for zeros."""
    shapes = [tensor.shape[1:] for tensor in (old, new) if tensor is not None]
    like = old if new is None else new
    merged = like.new_zeros(batch_size, *map(max, zip(*shapes, strict=True)))
    kept = torch.ones(batch_size, dtype=torch.bool)
    kept[rows] = False
    staying = kept.nonzero().squeeze(1)
    if old is not None:
        merged = _set_rows(merged, staying, old.index_select(0, staying.to(old.device)))
    return merged if new is None else _set_rows(merged, rows, new)


def _join_groups(groups: list[dict[str, Tensor]], sizes: list[int]) -> dict[str, Tensor]:
    keys = dict.fromkeys(key for group in groups for key in group)
    return {key: _join([group.get(key) for group in groups], sizes) for key in keys}


def _join(tensors: list[Tensor | None], sizes: list[int]) -> Tensor:
    """One behind the other; the sizes may differ in unfinished windows, and None stands for zeros."""
    given = [tensor for tensor in tensors if tensor is not None]
    shape = list(map(max, zip(*(tensor.shape[1:] for tensor in given), strict=True)))
    parts = zip(tensors, sizes, strict=True)
    return torch.cat([given[0].new_zeros(n, *shape) if each is None else _grown(each, shape) for each, n in parts])


def _grown(values, shape):
    """(B, ...) -> (B, *shape), zero behind what was there."""
    sizes = zip(reversed(values.shape[1:]), reversed(shape), strict=True)
    return torch.nn.functional.pad(values, [side for size, wanted in sizes for side in (0, wanted - size)])


def _set_rows(merged, rows, values):
    values = _grown(values, merged.shape[1:])
    return merged.index_copy(0, rows.to(merged.device), values.to(merged.dtype))
