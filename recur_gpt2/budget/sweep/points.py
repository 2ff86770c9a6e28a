"""The measurements of a sweep: a method at a window under each budget, and documents of growing length.

Each is made in a fresh process that is held to its budget; running out of memory is a result. What they cost is
measured here, how well a method predicts is models.py's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from subprocess import CalledProcessError

from transformers import PretrainedConfig

from ...errors import InputError
from ...evaluation.protocols import PROTOCOLS
from ...models.configuration import with_window
from ...models.flops import flops_per_token
from ..memory_model import Workload, memory_use
from ..recommend import SEGMENT, Recommendation, candidates, default_precision
from ..tasks import STEP_TOKENS
from ..worker import FAILED, OK, OUT_OF_MEMORY, Job, held, measured
from .arguments import METHODS
from .models import SweepModels

NOT_FITTING = "does not fit"
UNSCORED = "unscored"  # key of a row that was measured: why it could not be scored
MARGIN = 1.15  # the formulas may be off by so much: what is predicted to take a little more than a budget is tried
STEPS = 2  # of a measured finetuning, the first of them to warm up
READ_TOKENS = 16384  # of a measured reading, all lanes together
LENGTHS = {"generate": (256, 1024, 4096)}
OTHER_LENGTHS = (1024, 4096, 16384, 65536)


class SweepPoints:
    """Makes rows, of one task and one GPT-2.

    Args:
        config: of the GPT-2 that all start from.
        lanes: documents read side by side; None: as many as fit.
        precision: None: the task's default.
        most: bytes, the largest budget.
        scored: whether the rows say how well a method predicts; without, nothing is finetuned.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        models: SweepModels,
        *,
        task: str,
        lanes: int | None = None,
        precision: str | None = None,
        most: float = math.inf,
        scored: bool = True,
    ):
        self.config, self.models, self.task, self.lanes, self.scored = config, models, task, lanes, scored
        self.precision, self.most = precision or default_precision(task), most
        self._known = {}  # {a job without its budget: what was measured}

    def candidates(self, method: str, window: int) -> list[Recommendation]:
        """Settings, from the one that is wished for most; of finetuning those whose gradients reach equally far back,
        for the others would not end with the same model."""
        config = with_window(self.config, window, **METHODS[method].options(window))
        return [
            each
            for each in candidates(config, self.task, self.precision)
            if (self.task != "train" or each.workload.windows == SEGMENT) and self.lanes in (None, each.workload.lanes)
        ]

    def points(self, method: str, window: int, budgets: list[int | None]) -> list[dict]:
        """Rows of one method and window.

        Args:
            budgets: for each a row of the first settings that fit, and rows of those that did not. None: the settings
                that take least, if that is no more than `most`.
        """
        settings = self.candidates(method, window)
        smallest = sorted(settings, key=lambda each: each.use.total)[:1]
        least = smallest[0].use.total / MARGIN if smallest else math.inf
        rows = [self._not_fitting(method, window, budget, least) for budget in budgets if (budget or self.most) < least]
        fitting = [budget for budget in budgets if (budget or self.most) >= least]
        for number, budget in enumerate(fitting):
            try:
                rows += self._attempts(method, window, budget, settings if budget else smallest)
            except (CalledProcessError, InputError) as error:  # the next ones would end as this one did
                rows += [self._failed(method, window, each, error) for each in fitting[number:]]
                break
        self.score([row for row in rows if row["status"] == OK])
        return rows

    def score(self, rows: list[dict]) -> None:
        """Add to measured rows of one method and window how well it predicts; why not, where that fails."""
        if not rows or not self.scored:
            return
        try:
            quality = self.models.quality(METHODS[rows[0]["method"]], rows[0]["window"])
        except (CalledProcessError, InputError) as error:
            quality = {UNSCORED: _said(error)}
        for row in rows:
            row.pop(UNSCORED, None)
            row |= quality

    def length(self, method: str, window: int, length: int) -> list[dict]:
        """One row: a document of so many tokens, alone and without recomputation."""
        segments = {"windows": SEGMENT, "accumulate": max(1, STEP_TOKENS // (SEGMENT * window))}
        alone = segments if self.task == "train" else {"windows": 1}
        workload = Workload(self.task, lanes=1, precision=self.precision, **alone)
        config = with_window(self.config, window, **METHODS[method].options(window))
        flops = flops_per_token(config, training=self.task == "train")
        settings = Recommendation(config, workload, memory_use(config, workload), flops)
        row = {"kind": "length", "id": f"{self.task}, {method}, window {window}, {length} tokens"}
        row |= {"task": self.task, "method": method, "window": window, "length": length}
        try:
            job = self._job(method, settings, length=length, steps=max(2, length // STEP_TOKENS))
        except (CalledProcessError, InputError) as error:
            return [row | {"status": FAILED, "reason": _said(error)}]
        return [row | self._measured(job)]

    def _attempts(self, method, window, budget, settings) -> Iterator[dict]:
        """A row for each of the settings that should fit, up to the first that does."""
        for each in settings:
            if budget is not None and each.use.total > MARGIN * budget:
                continue
            found = self._measured(self._job(method, each, budget=budget))
            yield self._row(method, window, budget, each) | found
            if found["status"] != OUT_OF_MEMORY:
                return

    def _job(self, method, settings, **options):
        """What to measure. A reading takes the finetuned model, if there is to be one; finetuning starts from GPT-2."""
        config, work, how = settings.config, settings.workload, METHODS[method]
        fields = how.options(config.window)
        reading = self.task != "train"
        model = str(self.models.path(how, config.window)) if reading and self.scored else self.models.model
        length = READ_TOKENS // work.lanes + 1 if reading else 0
        return Job(
            model=model,
            workload=work,
            window=config.window,
            recurrence=fields.pop("recurrence"),
            options=fields,
            device=self.models.device,
            **{"protocol": how.protocol if self.task == "score" else "disjoint"}
            | {"steps": STEPS, "length": length}
            | options,
        )

    def _measured(self, job):
        """What a job costs. Two methods may have the same, and a larger budget may have no better use."""
        key = repr(replace(job, budget=None))
        if key in self._known:
            return held(self._known[key], job.budget)
        found = measured(job)
        if found["status"] == OK:
            self._known[key] = found
        return found

    def _row(self, method, window, budget, settings):
        work, passes = settings.workload, PROTOCOLS[METHODS[method].protocol].passes
        options = {key: value for key, value in asdict(work).items() if key != "task"}
        return {
            **self._point(method, window, budget, settings),
            "settings": options,
            "predicted_memory_bytes": settings.use.total,
            "flops_per_token": flops_per_token(settings.config) * passes,
            "training_flops_per_token": flops_per_token(settings.config, training=True),
        }

    def _point(self, method, window, budget, settings=None):
        point = {"kind": "point", "task": self.task, "method": method, "window": window, "budget_bytes": budget}
        how = "" if settings is None else f", {settings.workload.lanes} lanes"
        how += ", recomputation" if settings is not None and settings.workload.checkpointing else ""
        amount = "least" if budget is None else f"{budget / 2**20:,.10g} MiB"
        return {"id": f"{self.task}, {method}, window {window}, {amount}{how}"} | point

    def _not_fitting(self, method, window, budget, least):
        reason = f"needs {least / 2**20:,.0f} MiB by the formulas"
        if least == math.inf:
            reason = f"has no settings with {self.lanes} lanes"
        return self._point(method, window, budget) | {"status": NOT_FITTING, "reason": reason}

    def _failed(self, method, window, budget, error):
        return self._point(method, window, budget) | {"status": FAILED, "reason": _said(error)}


def _said(error):
    if isinstance(error, CalledProcessError):
        return f"{' '.join(error.cmd[2:4])} ended with status {error.returncode}, and said why above"
    return str(error)


def lengths_of(task: str) -> tuple[int, ...]:
    """Documents' lengths at which memory is measured; writing is slower than reading."""
    return LENGTHS.get(task, OTHER_LENGTHS)
