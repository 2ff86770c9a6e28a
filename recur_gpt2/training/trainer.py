"""Windowed finetuning: truncated backpropagation through time over lanes of windows.

A step reads a segment of K windows in every lane, with the state that the segment before left, detached. Several
processes, each with lanes of its own, compute what one process with all their lanes would. Not for what a checkpoint
holds (checkpoints.py), nor for scoring (evaluate.py).
"""

from __future__ import annotations

import math
import signal
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ..data.batches import DocumentSource, TrainingLanes
from ..errors import InputError
from ..models.block import is_feature_map, is_new
from ..models.configuration import OWN_FIELDS
from ..models.modeling import RecurGPT2LMHeadModel
from .arguments import TrainingArguments
from .checkpoints import Checkpoint, Checkpoints
from .distillation import TransferLoss
from .distributed import Processes
from .loss import SegmentLoss
from .optimizer import make_optimizer, set_rates
from .precision import autocast_dtype


class Trainer:
    """Finetunes a model in place, with checkpoints, logs and exact resumption."""

    def __init__(
        self,
        model: RecurGPT2LMHeadModel,
        corpus: DocumentSource,
        args: TrainingArguments,
        folder: Path,
        *,
        device: str = "auto",
    ):
        """`folder` holds checkpoints and logs. `device`: "auto", "cpu" or "cuda"."""
        _check_what_learns(model, args)
        self.args, self.folder, self.corpus = args, Path(folder), corpus
        self.model = model
        self.learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.processes = Processes(device)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self._settings(), self.processes)
        self.history: list[dict] = []
        self._stop = False

    def run(self, *, resume: bool = False, description: str = "finetuning") -> list[dict]:
        """Train for `args.steps`, from the last checkpoint with `resume`.

        Returns:
            One {"step", "tokens", "loss" (nats per token), "tokens_per_second"} a step; steps of attention transfer
            have "divergence" (nats per query) in place of the loss.

        Raises:
            InputError: the folder's checkpoints are of other settings, or of an earlier run that is not to be resumed;
                training diverged; or the disk is full.
            KeyboardInterrupt: after Ctrl-C, once a checkpoint is written.
        """
        processes = self.processes
        with processes.agreeing():
            self.checkpoints.check(resume=resume)
            torch.manual_seed(self.args.seed + processes.index)  # dropout differs between processes
            self.model.to(processes.device)
            optimizer = make_optimizer(self.model, self.args)
            saved = self.checkpoints.load(self.model, optimizer, processes.device) if resume else None
            step, tokens, state, lanes = self._start(saved)
        processes.share_parameters(self.model)
        dtype = self._dtype(saved)
        self.model.train()
        # From purge_step on, TensorBoard forgets what a killed run logged after its last checkpoint.
        writer = SummaryWriter(self.folder / "logs", purge_step=step + 1) if processes.is_main else None
        bar = tqdm(
            total=self.args.all_steps,
            initial=step,
            desc=description,
            unit="step",
            dynamic_ncols=True,
            disable=not processes.is_main,
        )
        stopping = False  # looked up once a step: a signal in between is one for the next step
        with self._interruptible(), self._all_learning_afterwards(), bar:
            while step < self.args.all_steps and not stopping:
                began = time.perf_counter()
                set_rates(optimizer, self.args, step)
                loss, measure = self._phase(step)
                nats, count, state = self._step(loss, optimizer, lanes, state, dtype)
                step, tokens = step + 1, tokens + count
                row = {"step": step, "tokens": tokens, measure: nats / count}
                row["tokens_per_second"] = count / (time.perf_counter() - began)
                self.history.append(row)
                self._log(writer, bar, row)
                stopping = processes.any(self._stop)
                if step % self.args.save_every == 0 or step == self.args.all_steps or stopping:
                    self._save(step, tokens, optimizer, state, lanes, dtype)
        if writer is not None:
            writer.close()
        self.model.eval()
        if processes.any(self._stop):
            raise KeyboardInterrupt(f"stopped after step {step}; --resume goes on from there")
        return self.history

    def _phase(self, step) -> tuple[nn.Module, str]:
        """The loss of this step, and what it is called; sets which parameters learn."""
        if step < self.args.transfer_steps:
            learns, phase = is_feature_map, (TransferLoss(self.model, recurrent=self.args.recurrent), "divergence")
        else:
            new_alone = step - self.args.transfer_steps < self.args.new_first_steps
            learns, phase = is_new if new_alone else bool, (SegmentLoss(self.model, self.args), "loss")
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self.learning and learns(name))
        return phase

    def _step(self, loss, optimizer, lanes, state, dtype):
        """One optimizer step -> nats and scored tokens of all processes, and the state of this one's lanes."""
        nats, count, device = 0.0, 0, self.processes.device
        for _ in range(self.args.accumulate):
            segment = lanes.segment(self.args.bptt)
            state = None if state is None else state.detach()
            # A token weighs the same in whichever process it is scored.
            scored = int(self.processes.sum(segment.scored))
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                total, state = loss(segment.to(device), state)
            if total.requires_grad:  # first windows do not depend on the memory, which may be all that learns
                (total / (max(1, scored) * self.args.accumulate)).backward()
            nats, count = nats + total.item(), count + scored
        self.processes.sum_gradients(self.model)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip)
        nats = self.processes.sum(nats)
        self._check(nats, float(norm))
        optimizer.step()
        optimizer.zero_grad()
        return nats, count, state

    def _check(self, nats, norm):
        """Refuse to take a step that would spoil the weights. The numbers are the same in all processes."""
        if math.isfinite(nats) and math.isfinite(norm):
            return
        kept = self.checkpoints.latest()
        at = f"the last good checkpoint is {kept}" if kept else "no checkpoint was written yet"
        with self.processes.agreeing():
            raise InputError(
                f"training diverged at step {len(self.history) + 1} (the loss or its gradient is not finite); {at}; "
                f"lower --lr (it was {self.args.lr:g})"
            )

    def _settings(self):
        settings = asdict(self.args)
        for free in ("save_every", "checkpointing", "parallel_windows", "precision"):
            settings.pop(free)
        config = {key: value for key, value in self.model.config.to_dict().items() if key in MODEL_SETTINGS}
        return settings | config | {"data": self.corpus.fingerprint, "processes": self.processes.count}

    def _dtype(self, saved):
        """What to compute in: as the main process measures; a resumed run goes on in the type that it began with."""
        if saved is not None:
            return torch.bfloat16 if saved.precision == "bfloat16" else None
        dtype = autocast_dtype(self.model, self.args.precision, training=True)
        return torch.bfloat16 if self.processes.any(self.processes.is_main and dtype is not None) else None

    def _start(self, saved: Checkpoint | None):
        lanes = TrainingLanes(
            self.corpus,
            lanes=self.args.lanes,
            window=self.model.config.window,
            seed=self.args.seed,
            position=None if saved is None else saved.position,
            share=(self.processes.index, self.processes.count),
        )
        if saved is None:
            return 0, 0, None, lanes
        self.history = saved.history
        return saved.step, saved.tokens, saved.state, lanes

    def _save(self, step, tokens, optimizer, state, lanes, dtype):
        precision = "float32" if dtype is None else "bfloat16"
        checkpoint = Checkpoint(step, tokens, precision, self.history, lanes.position(), state)
        self.checkpoints.save(self.model, optimizer, checkpoint)

    def _log(self, writer, bar, row):
        bar.update()
        measure = "loss" if "loss" in row else "divergence"
        bar.set_postfix({measure: f"{row[measure]:.3f}", "tok_s": f"{row['tokens_per_second']:,.0f}"})
        if writer is not None:
            for name in (measure, "tokens_per_second"):
                writer.add_scalar(name, row[name], row["step"])

    @contextmanager
    def _all_learning_afterwards(self):
        """What a phase leaves out learns again when the run is over, however it ends."""
        try:
            yield
        finally:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name in self.learning)

    @contextmanager
    def _interruptible(self):
        """Ctrl-C and termination wait for the step under way; a second Ctrl-C does not."""

        def stop(number, frame):
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True

        try:
            before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread, where signals cannot be set
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


MODEL_SETTINGS = {
    *("n_layer", "n_embd", "n_head", "n_inner", "n_positions", "vocab_size", "activation_function"),
    *("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    *OWN_FIELDS,
} - {"recurrence"}  # a preset's name: its fields say what it is


def _check_what_learns(model, args):
    if args.new_first_steps and not any(map(is_new, dict(model.named_parameters()))):
        raise InputError(
            f"new_first_steps={args.new_first_steps} trains what is new alone, and nothing is new in this model; leave "
            f"it out, or give the model a recurrence or linear attention"
        )
    if args.transfer_steps and not any(map(is_feature_map, dict(model.named_parameters()))):
        raise InputError(
            f"transfer_steps={args.transfer_steps} teaches feature maps, and this model has none that learns; "
            f"convert it (--attention t2r, with another map than elu or with near_tokens) or leave the transfer out"
        )
