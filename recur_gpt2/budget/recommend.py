"""Settings that fit a memory budget, from the formulas of memory.py, and the command that runs them.

Of what fits, the largest window is taken, since longer context is what quality follows; then no recomputation before
some, which costs a third more time; then as many lanes as a step can use. Nothing is measured here.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from ..errors import InputError
from ..models.configuration import RecurGPT2Config, with_window
from ..models.flops import flops_per_token
from ..models.generation import PARALLEL_WINDOWS
from ..models.hub import load_config
from ..ops.matmul import has_bfloat16_products
from .memory_model import MemoryUse, Workload, memory_use
from .tasks import STEP_TOKENS, t2r_flags

WINDOWS = (1024, 512, 256, 128, 64)
ROOM = 64  # positions for what stands in front of the longest window: without them memory is worth little there
MOST_LANES = 16  # in training: the most of any use on a CPU; and the text must have as many documents
SEGMENT = 4  # K, windows that gradients reach back over
BLOCK_TOKENS = 2048  # read at once without gradients: as fast as more on a CPU
COMMANDS = {"train": "finetune", "score": "evaluate", "embed": "embed", "generate": "generate"}
MARGIN = 1.1  # what fits must fit with so much room: the formulas are right to a tenth
DOCUMENTS = 96 * 2**20  # beside the model: tokenizer, documents, logs, threads; 77 where the text is tokenised first
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@dataclass(frozen=True)
class Recommendation:
    """Settings for a task, and what they should take.

    Attributes:
        config: of the model, window and recurrence included.
        flops_per_token: of the task.
    """

    config: RecurGPT2Config
    workload: Workload
    use: MemoryUse
    flops_per_token: float

    @property
    def peak(self) -> int:
        """Bytes to have for a whole run."""
        return room(self.use.total)


def room(peak: int) -> int:
    """Bytes to have for a run whose model is predicted or measured to take `peak`: a margin for the heap, and what a
    whole run has beside its model."""
    return round(MARGIN * peak) + DOCUMENTS


def parse_bytes(text: str) -> int:
    """ "512MiB", "2GiB", "1.5G" -> bytes.

    Raises:
        InputError: it says no amount of memory.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?)b?\s*", text.lower())
    if not found or found[2] not in UNITS:
        raise InputError(f"{text!r} is no amount of memory; give one like 512MiB or 2GiB")
    return int(float(found[1]) * UNITS[found[2]])


def recommend(
    model: str,
    budget: int,
    task: str = "train",
    *,
    windows: tuple[int, ...] | None = None,
    recurrence: str = "default",
    precision: str | None = None,
    most_lanes: int | None = None,
    options: dict | None = None,
) -> Recommendation:
    """The best settings whose predicted peak, with a margin, stays within the budget.

    Args:
        model: GPT-2 or one of our models (whose window then is given): hub id or folder.
        budget: bytes above what the interpreter and its libraries take.
        task: one of memory.TASKS.
        windows: T to choose from; None: those up to the model's positions, less ROOM with recurrence.
        recurrence: preset, for a GPT-2.
        precision: "float32" or "bfloat16"; None: 16 bit where the processor has products in it, for training alone.
        most_lanes: for training, as many as there are documents; None: MOST_LANES.
        options: for a GPT-2, other fields of RecurGPT2Config.

    Raises:
        InputError: nothing fits (it says the least that would), or the model cannot have such a window.
    """
    precision = precision or default_precision(task)
    configs = _configs(load_config(model), windows, recurrence, options or {})
    least = None
    for config in configs:
        for each in candidates(config, task, precision, most_lanes or MOST_LANES):
            if each.peak <= budget:
                return each
            least = each if least is None or each.peak < least.peak else least
    raise InputError(
        f"a budget of {budget / 2**20:,.0f} MiB does not hold this: the least is {least.peak / 2**20:,.0f} MiB, at "
        f"window {least.config.window}, of which {least.use.fixed / 2**20:,.0f} are weights and what goes with them; "
        f"give that much or a smaller model"
    )


def default_precision(task):
    """What a task is computed in unless said otherwise: weights are cast on the fly, which takes memory, and is worth
    it where products dominate."""
    return "bfloat16" if task == "train" and has_bfloat16_products() else "float32"


def _configs(config, windows, recurrence, options):
    if config.model_type == RecurGPT2Config.model_type:
        if windows and config.window not in windows:
            raise InputError(f"the model was made for window={config.window}, not {windows[0]}; leave --window out")
        return [config]
    if not windows:
        most = config.n_positions - (0 if recurrence == "none" else min(ROOM, config.n_positions // 2))
        windows = dict.fromkeys(min(window, most) for window in WINDOWS)
    return [with_window(config, window, recurrence=recurrence, **options) for window in windows]


def candidates(
    config: RecurGPT2Config, task: str, precision: str, most_lanes: int = MOST_LANES
) -> Iterator[Recommendation]:
    """All settings for one window, from the one that is wished for most."""
    flops = flops_per_token(config, training=task == "train")
    ways = _steps(config, precision, most_lanes) if task == "train" else _readings(config, task, precision)
    for workload in ways:
        yield Recommendation(config, workload, memory_use(config, workload), flops)


def _steps(config, precision, most_lanes):
    """Ways through a step of STEP_TOKENS tokens: many lanes at a time before few, no recomputation before some."""
    whole = max(1, STEP_TOKENS // (SEGMENT * config.window))
    lanes = [some for halvings in range(whole.bit_length()) if (some := whole >> halvings) <= most_lanes]
    for checkpointing, some in product((False, True), lanes):
        yield Workload("train", some, SEGMENT, checkpointing, precision, whole // some)
    for segment in (2, 1):  # gradients that reach back less far
        yield Workload("train", 1, segment, True, precision, whole * SEGMENT // segment)


def _readings(config, task, precision):
    """As many lanes as make a block of BLOCK_TOKENS, a window of each at a time; fewer where they do not fit. A text is
    written alone, after a prompt that is read some windows at a time."""
    if task == "generate":
        yield Workload(task, 1, PARALLEL_WINDOWS, False, precision)
        return
    most = max(1, BLOCK_TOKENS // config.window)
    for halvings in range(most.bit_length()):
        yield Workload(task, most >> halvings, 1, False, precision)


def command(recommendation: Recommendation, model: str, data: str = "pg19-sample", protocol: str | None = None) -> str:
    """What to type.

    Args:
        model: hub id or folder, of a GPT-2 to finetune, or of whatever is to read.
        protocol: score: the one to score by; None: all.
    """
    work, config = recommendation.workload, recommendation.config
    words = ["recur-gpt2", COMMANDS[work.task]]
    if work.task == "embed":
        words += [data, "--output", "embeddings.parquet"]
    words += ["--model", model, "--window", str(config.window)]
    if work.task == "train":
        words += ["--data", data, "--lanes", str(work.lanes), "--bptt", str(work.windows)]
        words += ["--accumulate", str(work.accumulate), "--precision", work.precision]
        words += ["--checkpointing"] if work.checkpointing else []
        words += ["--recurrence", config.recurrence] if config.recurrence != "default" else []
        words += t2r_flags(config.near_tokens) if config.linear_layers else []
    elif work.task == "score":
        words += ["--data", data, "--lanes", str(work.lanes), "--parallel-windows", str(work.windows)]
        words += ["--precision", work.precision]
        words += ["--protocols", protocol] if protocol else ["--recurrence", config.recurrence]
    elif work.task == "generate":
        words += ["--precision", work.precision]
        words += ["--recurrence", config.recurrence] if protocol is None else []
    elif work.task == "embed":
        words += ["--batch-tokens", str(work.lanes * work.windows * config.window)]
    return shlex.join(words)


def settings_line(recommendation: Recommendation) -> str:
    """The settings in a sentence."""
    work, use = recommendation.workload, recommendation.use
    parts = [f"window {recommendation.config.window}", f"{work.lanes} lanes"]
    if work.task == "train":
        parts += [f"{work.windows} windows a segment", f"{work.accumulate} segments a step"]
        parts += ["recomputation"] if work.checkpointing else []
    parts += [work.precision]
    mib = 2**20
    return (
        f"{', '.join(parts)}: {use.total / mib:,.0f} MiB predicted, {recommendation.peak / mib:,.0f} to be safe "
        f"({use.fixed / mib:,.0f} are weights, gradients and optimizer)"
    )
