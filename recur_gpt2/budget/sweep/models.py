"""The models of a sweep: one for each kind and window, finetuned once, and how well each reads.

They lie in one folder, which several sweeps of the same model and text may share:

    w256-recurrent/recurrent/model     as `recur-gpt2 finetune --output-dir w256-recurrent` leaves it
    w256-recurrent/scores/*.json       as `recur-gpt2 evaluate --json` does

What is there is used, so that a user's own models can be put there; what is not is made. Costs are not measured here.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ...data.corpora import load_corpus
from ...errors import InputError
from ...models.hub import load_config, load_tokenizer
from ...training.arguments import TrainingArguments
from ..recommend import SEGMENT
from ..runs import finetuned
from ..tasks import STEP_TOKENS
from .arguments import Method

LANES = TrainingArguments.lanes  # of a finetuning, with fewer where a window is long


@dataclass(frozen=True)
class SweepModels:
    """Finetunes and scores in processes of their own, what the folder does not hold yet."""

    folder: Path
    model: str
    """GPT-2 that all start from."""
    data: str
    finetune_tokens: int
    """Each model's, in steps of STEP_TOKENS."""
    eval_split: str
    eval_tokens: int
    """Scored, as many from the start of each document."""
    precision: str
    device: str = "auto"
    most_lanes: int = LANES
    """Of a finetuning: no more than there are documents."""

    def check_data(self, kinds: Iterable[tuple[Method, int]]) -> None:
        """Find the text that these methods at these windows are finetuned on, if a model is missing, and scored on.

        Raises:
            InputError: there is none; better said once than by every process of a sweep.
        """
        tokenizer = load_tokenizer(self.model)
        splits = ["train"] if any(self.missing(*kind) for kind in kinds) else []
        for split in [*splits, self.eval_split]:
            load_corpus(self.data, split, tokenizer)

    def path(self, method: Method, window: int) -> Path:
        """Where the model of a method lies; finetuned if nothing is there.

        Raises:
            InputError: what lies there is another kind of model.
            subprocess.CalledProcessError: finetuning failed, and said why on its own error output.
        """
        model = self._model(method, window)
        if self.missing(method, window):
            finetuned(self.run(method, window), self._flags(method, window))
        config = load_config(str(model))
        found = (config.window, config.is_recurrent, bool(config.linear_layers))
        if found != (window, method.recurrent, method.linear):
            raise InputError(
                f"{model} was made with window={config.window}, recurrence={config.recurrence!r} and "
                f"linear_layers={config.linear_layers}, which is not {method.model} at window {window}; move it away"
            )
        return model

    def run(self, method: Method, window: int) -> Path:
        """The folder of a model's finetuning."""
        return self.folder / f"w{window}-{method.model}"

    def missing(self, method: Method, window: int) -> bool:
        """Whether a model must be finetuned yet."""
        return not self._model(method, window).exists()

    def quality(self, method: Method, window: int) -> dict:
        """The scores of a method: what a row of results.json says of them, with each document's tokens and nats.

        Raises:
            As `path`.
        """
        model = self.path(method, window)
        name = f"{Path(self.data).name}-{self.eval_split}-{self.eval_tokens}-{method.protocol}.json"
        scores = self.run(method, window) / "scores" / name
        if not scores.exists():
            scores.parent.mkdir(exist_ok=True)
            _evaluate(scores, model, self, method.protocol)
        found = json.loads(scores.read_text())
        (row,) = found["rows"]
        measured = ("name", "window", "peak_memory_bytes", "tokens_per_second")
        kept = {key: value for key, value in row.items() if key not in measured}
        (nats,) = found["loss_by_document"].values()
        return kept | {"document_nats": nats, "document_tokens": found["tokens_by_document"], "model": str(model)}

    def _model(self, method, window):
        return self.run(method, window) / "recurrent" / "model"

    def _flags(self, method, window):
        lanes = max(1, min(self.most_lanes, STEP_TOKENS // (SEGMENT * window)))
        tokens = {"steps": self.finetune_tokens // STEP_TOKENS, "lanes": lanes, "bptt": SEGMENT}
        tokens["accumulate"] = STEP_TOKENS // (lanes * SEGMENT * window)
        flags = ["--model", self.model, "--data", self.data, *method.flags(window), "--no-control"]
        flags += [word for name, value in tokens.items() for word in (f"--{name}", str(value))]
        return [*flags, "--precision", self.precision, "--device", self.device, "--rows"]  # no rows: no scoring


def _evaluate(scores, model, models, protocol):
    command = [sys.executable, "-m", "recur_gpt2.cli", "evaluate", "--model", str(model), "--data", models.data]
    command += ["--split", models.eval_split, "--eval-tokens", str(models.eval_tokens), "--protocols", protocol]
    command += ["--precision", models.precision, "--device", models.device, "--json", str(scores)]
    print("+", shlex.join(command), flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
