"""Settings of a comparison and of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..data.bundle import BUNDLED_MODEL
from ..errors import InputError, check_range
from ..training.arguments import TrainingArguments
from .protocols import ROWS

PARALLEL_WINDOWS = 4  # of a document computed at once: enough on a CPU (docs/performance.md)


@dataclass
class ComparisonArguments:
    """Settings of one comparison."""

    output_dir: Path
    """Where everything is written; None: runs/NAME-wWINDOW."""
    model: str = str(BUNDLED_MODEL)
    """GPT-2 checkpoint, or a model of ours to go on with: hub id or folder."""
    data: str = "pg19-sample"
    """Documents: pg19-sample, wikitext-103-sample, pg19, wikitext-103 or a path."""
    window: int = 256
    """T, tokens a window."""
    recurrence: str = "default"
    """Preset of the memory: default, yoshida2020 or none."""
    model_options: dict = field(default_factory=dict)
    """Fields of RecurGPT2Config that differ from the preset: slots, layers, linear attention."""
    training: TrainingArguments = field(default_factory=TrainingArguments)
    """How both are finetuned."""
    eval_split: Literal["train", "validation", "test"] = "test"
    """Documents that are scored."""
    eval_tokens: int = 147456
    """Tokens to score, as many from the start of each document; 0 for all."""
    control: bool = True
    """Finetune and score the disjoint control too."""
    rows: list[str] | None = None
    """Rows to score, of the comparison; None: all."""
    horizons: list[int] | None = None
    """Score the recurrent model with states of so many last windows alone, too: 0 1 2 4 8 16; None: do not."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: a GPU if there is one."""
    resume: bool = False
    """Go on where an earlier run in --output-dir stopped."""

    def __post_init__(self):
        self.output_dir = Path(self.output_dir)
        unknown = [row for row in self.rows or () if row not in ROWS]
        if unknown:
            raise InputError(f"row {unknown[0]!r} is not known; use some of {', '.join(ROWS)}")
        check_range(2, eval_tokens=self.eval_tokens or None)
        check_horizons(self.horizons)


@dataclass
class EvaluationArguments:
    """Settings of one evaluation."""

    model: str = str(BUNDLED_MODEL)
    """GPT-2 or recur_gpt2 model: hub id or folder."""
    data: str = "pg19-sample"
    """Documents: pg19-sample, wikitext-103-sample, pg19, wikitext-103 or a path."""
    split: Literal["train", "validation", "test", "all"] = "all"
    """Documents to score; all: the test split, and of files or folders without splits of their own everything."""
    window: int | None = None
    """T; None: the model's own, or 256 for a GPT-2."""
    recurrence: str = "none"
    """For a GPT-2: score it with this recurrence, untrained."""
    protocols: list[str] | None = None
    """Of disjoint, overlap, recurrent, recurrent+overlap, zeroed and shuffled; None: all that are possible."""
    horizons: list[int] | None = None
    """Score with states of so many last windows alone, too, beside the whole document's: 0 1 2 4 8 16; None: do not."""
    stride: int | None = None
    """Tokens from one window to the next in the protocol overlap, 1 to a window; None: half a window."""
    word_count: int | None = None
    """Words to divide by for word perplexity, a corpus' official count; None: those between spaces."""
    eval_tokens: int = 0
    """Tokens to score, as many from the start of each document; 0 for all."""
    lanes: int = 8
    """Documents read in one batch."""
    parallel_windows: int = PARALLEL_WINDOWS
    """Windows of a document computed at once."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What to compute in; auto: whichever a short trial finds faster."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: a GPU if there is one."""

    def __post_init__(self):
        counts = ("lanes", "parallel_windows", "word_count", "stride")
        check_range(1, **{name: getattr(self, name) for name in counts})
        check_range(2, eval_tokens=self.eval_tokens or None)
        check_horizons(self.horizons)


def check_horizons(horizons: list[int] | None) -> None:
    """Refuse horizons below 0, and an empty list of them."""
    if horizons is not None and not horizons:
        raise InputError("horizons is empty; name some, such as 0 1 2 4 8 16, or leave it out")
    check_range(0, **{f"horizons[{number}]": horizon for number, horizon in enumerate(horizons or ())})
