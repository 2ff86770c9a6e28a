"""Settings of one finetuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import LARGEST_FLOAT, LARGEST_SEED, InputError, check_range


@dataclass
class TrainingArguments:
    """Settings of one finetuning. Those that change its result are kept in its checkpoints and checked on resuming."""

    steps: int = 120
    """Optimizer steps."""
    lanes: int = 8
    """Rows of a batch, each going through documents of its own, in each process."""
    bptt: int = 4
    """K, windows that gradients reach back over: a segment."""
    lr: float = 3e-5
    """Peak learning rate of the pretrained parameters."""
    recurrence_lr: float = 3e-3
    """Peak learning rate of what is new: the recurrence, feature maps, the decay of carried sums."""
    transfer_steps: int = 0
    """Steps of attention transfer before finetuning: feature maps learn the softmax attention that they replace."""
    transfer_lr: float = 1e-2
    """Peak learning rate of the steps of attention transfer."""
    new_first_steps: int = 0
    """Of --steps, so many at their start train what is new alone."""
    warmup: float = 0.05
    """Share of the steps over which the rates rise; afterwards they fall linearly to zero."""
    weight_decay: float = 0.01
    """AdamW's decay of weight matrices."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    accumulate: int = 1
    """Segments per optimizer step."""
    recurrent: bool = True
    """False reads every window apart: the disjoint control."""
    parallel_windows: int | None = None
    """P, windows of a lane computed at once; None: all K, or 1 with checkpointing."""
    checkpointing: bool = False
    """Recompute each block of windows, layer by layer, in the backward pass: least memory, flat in K, for a third to a
    half more time."""
    lora_rank: int | None = None
    """Rank of LoRA adapters (PEFT), which learn at ten times --lr in place of the pretrained weights; what is new
    learns beside them, and the adapter alone is saved; None: no adapters."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What to compute in; auto: whichever a short trial finds faster."""
    seed: int = 0
    """Of the documents' order and of dropout."""
    save_every: int = 100
    """Steps between checkpoints."""

    def __post_init__(self):
        counts = ("steps", "lanes", "bptt", "accumulate", "save_every", "parallel_windows", "lora_rank")
        check_range(1, **{name: getattr(self, name) for name in counts})
        check_range(0, transfer_steps=self.transfer_steps, new_first_steps=self.new_first_steps)
        check_range(0, LARGEST_SEED, seed=self.seed)
        if self.new_first_steps > self.steps:
            raise InputError(f"new_first_steps={self.new_first_steps} exceeds steps={self.steps}; use {self.steps}")
        rates = {name: getattr(self, name) for name in ("lr", "recurrence_lr", "transfer_lr", "clip")}
        check_range(0, LARGEST_FLOAT, above=True, **rates)
        check_range(0, LARGEST_FLOAT, weight_decay=self.weight_decay)
        check_range(0, 1, warmup=self.warmup)

    @property
    def all_steps(self) -> int:
        """Optimizer steps in all, transfer included."""
        return self.transfer_steps + self.steps

    @property
    def block(self) -> int:
        """Windows computed at once."""
        return self.parallel_windows or (1 if self.checkpointing else self.bptt)
