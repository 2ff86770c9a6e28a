"""Settings of a sweep, and its methods: a model and the protocol that it reads by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...data.bundle import BUNDLED_MODEL
from ...errors import InputError, check_range
from ...evaluation.arguments import ComparisonArguments
from ...evaluation.protocols import PROTOCOLS
from ..tasks import STEP_TOKENS, TASKS, t2r_flags

NEAR = 4  # t2r: a window's fraction of positions near a query that keep softmax


@dataclass(frozen=True)
class Method:
    """A model, and the protocol that it reads by."""

    model: str
    """Its kind: disjoint, recurrent, t2r or recurrent+t2r."""
    protocol: str

    @property
    def recurrent(self) -> bool:
        return self.model.startswith("recurrent")

    @property
    def linear(self) -> bool:
        return self.model.endswith("t2r")

    def options(self, window: int) -> dict:
        """Fields of RecurGPT2Config beside GPT-2's and the window."""
        fields = {"recurrence": "default" if self.recurrent else "none"}
        if self.linear:
            fields |= {"linear_layers": "all", "near_tokens": window // NEAR}
        return fields

    def flags(self, window: int) -> list[str]:
        """The same for `recur-gpt2 finetune`."""
        options = self.options(window)
        flags = ["--window", str(window), "--recurrence", options["recurrence"]]
        return flags + (t2r_flags(options["near_tokens"]) if self.linear else [])


METHODS = {
    "disjoint": Method("disjoint", "disjoint"),
    "overlap": Method("disjoint", "overlap"),
    "recurrent": Method("recurrent", "recurrent"),
    "recurrent+overlap": Method("recurrent", "recurrent+overlap"),
    "t2r": Method("t2r", "disjoint"),
    "recurrent+t2r": Method("recurrent+t2r", "recurrent"),
}


@dataclass
class SweepArguments:
    """Settings of one sweep."""

    output_dir: Path
    """Folder for results.jsonl, results.csv, report.md and pictures."""
    model: str = str(BUNDLED_MODEL)
    """GPT-2 checkpoint: hub id or folder."""
    data: str = "pg19-sample"
    """Documents: pg19-sample, wikitext-103-sample, pg19, wikitext-103 or a path."""
    task: Literal["train", "score", "embed", "generate"] = "train"
    """What memory and speed are measured of."""
    budgets: list[int] | None = None
    """Bytes above what the interpreter and its libraries take; None: from the least that holds a point to the most that
    one can use."""
    windows: list[int] | None = None
    """T; None: 64 to 1024, as far as the model's positions go."""
    methods: list[str] | None = None
    """Of disjoint, overlap, recurrent, recurrent+overlap, t2r and recurrent+t2r; None: all that the task has."""
    lanes: int | None = None
    """Documents read side by side; None: as many as fit. In finetuning no more than these."""
    finetune_tokens: int = 40 * STEP_TOKENS
    """Tokens of every finetuning."""
    finetuned: Path | None = None
    """Folder of models and scores to use and add to, an earlier sweep's or your own; None: in --output-dir."""
    eval_split: Literal["train", "validation", "test"] = "test"
    """Documents that are scored."""
    eval_tokens: int = ComparisonArguments.eval_tokens
    """Tokens to score, as many from the start of each document; 0: memory and speed alone, nothing is finetuned."""
    precision: Literal["float32", "bfloat16"] | None = None
    """What to compute in; None: what this processor is made for."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: a GPU if there is one."""
    resume: bool = False
    """Go on with what an earlier sweep in --output-dir left."""

    def __post_init__(self):
        if self.task not in TASKS:
            raise InputError(f"task={self.task!r} is not known; use one of {', '.join(TASKS)}")
        self.methods = self.methods or methods_of(self.task)
        unknown = [name for name in self.methods if name not in methods_of(self.task)]
        if unknown:
            raise InputError(
                f"method {unknown[0]!r} is none of task {self.task}'s; use some of {', '.join(methods_of(self.task))}"
            )
        check_range(STEP_TOKENS, finetune_tokens=self.finetune_tokens)
        check_range(0, eval_tokens=self.eval_tokens)
        for window in self.windows or ():
            check_range(2, window=window)
        self.output_dir = Path(self.output_dir)
        self.finetuned = self.output_dir / "finetuned" if self.finetuned is None else Path(self.finetuned)


def methods_of(task: str) -> list[str]:
    """Those that a task has: only scoring reads twice, and finetuning for it."""
    twice = task in ("train", "score")
    return [name for name, method in METHODS.items() if twice or PROTOCOLS[method.protocol].passes == 1]
