"""Checkpoints of a training run: whole or not at all, without pickle, and refused for another run's settings."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .errors import InputError
from .state import RecurState

KEPT = 2


@dataclass
class Checkpoint:
    """Where a run stands, beside weights and optimizer.

    Attributes:
        step, tokens: done so far.
        precision: "float32" or "bfloat16", what the run computes in.
        position: LanePosition as a dict.
        history: one row a step.
        state: the lanes' state.
    """

    step: int
    tokens: int
    precision: str
    position: dict
    history: list[dict] = field(default_factory=list)
    state: RecurState | None = None


class Checkpoints:
    """The checkpoints of one run, newest last; the newest KEPT stay."""

    def __init__(self, folder: Path, settings: dict):
        """`settings`: JSON values; a checkpoint of other ones is refused."""
        self.folder, self.settings = Path(folder), json.loads(json.dumps(settings))

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None."""
        found = self._whole()
        return found[-1] if found else None

    def save(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint; an older one is deleted only when the new one is whole.

        Raises:
            InputError: it cannot be written (a full disk); the older ones survive.
        """
        target = self.folder / f"step-{checkpoint.step:08d}"
        unfinished = self.folder / f"{target.name}.unfinished"
        try:
            for rest in self.folder.glob("*.unfinished"):  # of a run that was killed while it wrote
                shutil.rmtree(rest)
            unfinished.mkdir(parents=True)
            self._write(unfinished, model, optimizer, checkpoint)
            if target.exists():
                shutil.rmtree(target)
            unfinished.rename(target)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            kept = self.latest()
            raise InputError(
                f"the checkpoint of step {checkpoint.step} could not be written to {self.folder} ({error}); "
                f"{'the last whole one is ' + kept.name if kept else 'there is none yet'}; make room, then --resume"
            ) from error
        for old in self._whole()[:-KEPT]:
            shutil.rmtree(old)
        return target

    def load(self, model, optimizer, device) -> Checkpoint | None:
        """Restore the newest checkpoint into model and optimizer; None if there is none.

        Raises:
            InputError: it is damaged, or of other settings.
        """
        folder = self.latest()
        if folder is None:
            return None
        try:
            meta = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            weights = load_file(folder / "model.safetensors", device=str(device))
            tensors = load_file(folder / "optimizer.safetensors")
            random = load_file(folder / "random.safetensors")
            state = RecurState.load(folder / "state.safetensors", device)
            settings, checkpoint = meta["settings"], Checkpoint(**meta["run"], state=state)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"checkpoint {folder} is damaged ({error}); delete it to go on from the one before"
            ) from error
        self._check(settings)
        model.to(device)
        model.load_state_dict(weights, strict=False)
        _restore_optimizer(optimizer, tensors)
        torch.set_rng_state(random["cpu"])
        if "cuda" in random and torch.cuda.is_available():
            torch.cuda.set_rng_state(random["cuda"])
        return checkpoint

    def _whole(self):
        return sorted(folder for folder in self.folder.glob("step-*") if folder.suffix != ".unfinished")

    def _check(self, saved):
        differing = [key for key in self.settings if saved.get(key) != self.settings[key]]
        if differing:
            key = differing[0]
            raise InputError(
                f"{self.folder.parent} holds a run with {key}={saved.get(key)!r}, not {self.settings[key]!r}; "
                f"resume with its settings or give another --output-dir"
            )

    def _write(self, folder, model, optimizer, checkpoint):
        save_file(_named_weights(model), folder / "model.safetensors", metadata={"format": "pt"})
        save_file(_optimizer_tensors(optimizer), folder / "optimizer.safetensors")
        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state()
        save_file(random, folder / "random.safetensors")
        checkpoint.state.save(folder / "state.safetensors")
        run = {key: value for key, value in vars(checkpoint).items() if key != "state"}
        (folder / "run.json").write_text(json.dumps({"settings": self.settings, "run": run}), encoding="utf-8")


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
