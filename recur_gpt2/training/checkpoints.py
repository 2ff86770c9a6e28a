"""Checkpoints of a training run: whole or not at all, without pickle, and refused for another run's settings.

With several processes the main one writes for all: lane states, lane positions and random numbers of each.
"""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..data.batches import LanePosition
from ..errors import InputError
from ..models.state import RecurState
from ..utils.files import clear_unfinished, whole_folder
from .distributed import Processes

KEPT = 2


@dataclass
class Checkpoint:
    """Where a run stands in one process, beside weights and optimizer.

    Attributes:
        step, tokens: done so far, by all processes together.
        precision: "float32" or "bfloat16", what the run computes in.
        history: one row a step.
        position, state: of this process's lanes.
    """

    step: int
    tokens: int
    precision: str
    history: list[dict] = field(default_factory=list)
    position: LanePosition | None = None
    state: RecurState | None = None


class Checkpoints:
    """The checkpoints of one run, newest last; the newest KEPT stay."""

    def __init__(self, folder: Path, settings: dict, processes: Processes):
        """`settings`: JSON values; a checkpoint of other ones is refused."""
        self.folder, self.settings, self.processes = Path(folder), json.loads(json.dumps(settings)), processes

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None."""
        found = self._whole()
        return found[-1] if found else None

    def check(self, *, resume: bool) -> None:
        """Whether a run may begin here, or go on with `resume`; changes nothing.

        Raises:
            InputError: there are checkpoints and they are not to be resumed, or they are of other settings.
        """
        newest = self.latest()
        if newest is None:
            return
        if not resume:
            raise InputError(
                f"{self.folder.parent} already holds a run's checkpoints; resume that run or give another --output-dir"
            )
        with _refusing_damage(newest):
            settings = json.loads((newest / "run.json").read_text(encoding="utf-8"))["settings"]
        self._check(settings)

    def save(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
        """Write a checkpoint; an older one is deleted only when the new one is whole. Every process calls it.

        Raises:
            InputError: it cannot be written (a full disk); the older ones survive.
        """
        everyones = self._gather(checkpoint)
        with self.processes.agreeing():
            if self.processes.is_main:
                self._save(model, optimizer, checkpoint, *everyones)

    def load(self, model, optimizer, device) -> Checkpoint | None:
        """Restore the newest checkpoint into model, optimizer and random numbers; None if there is none.

        Raises:
            InputError: it is damaged, or of other settings.
        """
        folder = self.latest()
        if folder is None:
            return None
        self.check(resume=True)
        with _refusing_damage(folder):
            meta = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            weights = load_file(folder / "model.safetensors", device=str(device))
            tensors = load_file(folder / "optimizer.safetensors")
            random = load_file(folder / "random.safetensors")
            state = RecurState.load(folder / "state.safetensors", device)
            checkpoint = Checkpoint(**meta["run"])
            positions = [LanePosition(**position) for position in meta["positions"]]
        model.to(device)
        model.load_state_dict(weights, strict=False)
        _restore_optimizer(optimizer, tensors)
        index, lanes = self.processes.index, state.batch_size // self.processes.count
        checkpoint.position = positions[index]
        checkpoint.state = state.select(range(index * lanes, (index + 1) * lanes))
        torch.set_rng_state(random["cpu"][index].clone())
        if "cuda" in random and torch.cuda.is_available():
            torch.cuda.set_rng_state(random["cuda"][index].clone())
        return checkpoint

    def _whole(self):
        return sorted(self.folder.glob(f"step-{'[0-9]' * 8}"))

    def _check(self, saved):
        differing = [key for key in self.settings if saved.get(key) != self.settings[key]]
        if differing:
            key = differing[0]
            raise InputError(
                f"{self.folder.parent} holds a run with {key}={saved.get(key)!r}, not {self.settings[key]!r}; "
                f"resume with its settings or give another --output-dir"
            )

    def _gather(self, checkpoint):
        """What each process has of its own -> lane state, lane positions and random numbers of all, in their order."""
        gather = self.processes.gather
        state = checkpoint.state.detach()
        rows = {name: gather(tensor).flatten(0, 1) for name, tensor in state.memory.items()}
        # Training reads whole windows: there is never one that is not full.
        state = RecurState(gather(state.windows).flatten(), gather(state.filled).flatten(), rows)
        position = checkpoint.position
        numbers = gather(torch.tensor([position.taken, *position.document, *position.window])).tolist()
        lanes = len(position.document)
        positions = [LanePosition(each[1 : 1 + lanes], each[1 + lanes :], each[0]) for each in numbers]
        random = {"cpu": gather(torch.get_rng_state())}
        if torch.cuda.is_available():
            random["cuda"] = gather(torch.cuda.get_rng_state())
        return state, positions, random

    def _save(self, model, optimizer, checkpoint, state, positions, random):
        try:
            clear_unfinished(self.folder, "step-*")
            with whole_folder(self.folder / f"step-{checkpoint.step:08d}") as folder:
                save_file(_named_weights(model), folder / "model.safetensors", metadata={"format": "pt"})
                save_file(_optimizer_tensors(optimizer), folder / "optimizer.safetensors")
                save_file(random, folder / "random.safetensors")
                state.save(folder / "state.safetensors")
                run = {key: value for key, value in vars(checkpoint).items() if key not in ("position", "state")}
                meta = {"settings": self.settings, "run": run, "positions": [asdict(each) for each in positions]}
                (folder / "run.json").write_text(json.dumps(meta), encoding="utf-8")
        except (OSError, SafetensorError) as error:
            kept = self.latest()
            raise InputError(
                f"the checkpoint of step {checkpoint.step} could not be written to {self.folder} ({error}); "
                f"{'the last whole one is ' + kept.name if kept else 'there is none yet'}; make room, then --resume"
            ) from error
        for old in self._whole()[:-KEPT]:
            shutil.rmtree(old)


@contextmanager
def _refusing_damage(folder):
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"checkpoint {folder} is damaged ({error}); delete it to go on from the one before") from error


def _named_weights(model):
    """Every parameter once: tied ones share a name."""
    return {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}


def _optimizer_tensors(optimizer):
    tensors = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            tensors[f"{index}.{key}"] = torch.as_tensor(value).contiguous()
    return tensors


def _restore_optimizer(optimizer, tensors):
    states = {}
    for name, tensor in tensors.items():
        index, key = name.split(".")
        states.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
