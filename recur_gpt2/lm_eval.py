"""lm-evaluation-harness on our models: a document or a prompt of any length is read with its state, never cut.

    python -m recur_gpt2.lm_eval --model recur_gpt2 --model_args pretrained=folder --tasks wikitext

is the harness's own command, with the model `recur_gpt2` beside its others. In a script, `import recur_gpt2.lm_eval`
registers it for `lm_eval.simple_evaluate(model="recur_gpt2", model_args=...)`.
Needs `pip install 'recur-gpt2[lm-eval]'`.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from .data.bundle import BUNDLED_RECURRENT
from .evaluation.arguments import PARALLEL_WINDOWS
from .evaluation.evaluate import evaluate
from .models.hub import load_tokenizer
from .models.loading import load_any
from .utils.device import checked_device

NO_LIMIT = sys.maxsize  # tokens of a prompt
LANES = 8


@register_model("recur_gpt2")
class RecurGPT2LM(HFLM):
    """One of our models, or a GPT-2 given a window.

    Likelihoods of continuations are the harness's own definition, over prompts of any length. Rolling likelihoods read
    a document once, with its state, and score all its tokens but the first, as `recur-gpt2 evaluate` does: the harness
    has the end-of-text token predict the first one too.
    """

    def __init__(
        self,
        pretrained: str = str(BUNDLED_RECURRENT),
        window: int | None = None,
        recurrence: str = "default",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **kwargs,
    ):
        """
        Args:
            pretrained: our model, an adapter of one, or a GPT-2: a folder or a hub id.
            window: T, of a GPT-2.
            recurrence: of a GPT-2: "default", "yoshida2020" or "none".
            kwargs: the harness's other arguments of HFLM.
        """
        if device is None or not torch.cuda.is_available():  # the harness asks for a GPU where there is none
            device = "auto"
        model = load_any(pretrained, window, recurrence).to(checked_device(device))
        super().__init__(
            pretrained=model,
            tokenizer=load_tokenizer(pretrained),
            backend="causal",
            batch_size=int(batch_size) if str(batch_size).isdigit() else 1,
            max_length=NO_LIMIT,
            **kwargs,
        )

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        documents = [np.array(self.tok_encode(request.args[0])) for request in requests]
        scored = [number for number, tokens in enumerate(documents) if len(tokens) > 1]
        found = [0.0] * len(documents)
        if scored:
            evaluation = evaluate(
                self.model,
                [documents[number] for number in scored],
                self.tokenizer,
                protocol="recurrent" if self.model.config.is_recurrent else "disjoint",
                lanes=LANES,
                parallel_windows=PARALLEL_WINDOWS,
                progress=not disable_tqdm,
            )
            for number, losses in zip(scored, evaluation.losses, strict=True):
                found[number] = -float(losses.sum())
        for request, likelihood in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, likelihood)
        return found

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether it is the likeliest at each step) of each request."""
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        order = sorted(range(len(requests)), key=lambda number: -sum(map(len, requests[number][1:])))
        size = override_bs or self.batch_size
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests")
        for first in range(0, len(order), size):
            numbers = order[first : first + size]
            rows = [torch.tensor([*requests[number][1], *requests[number][2]][:-1]) for number in numbers]
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            kept = [(len(row) - len(requests[number][2]), len(row)) for row, number in zip(rows, numbers, strict=True)]
            read = self.model.predict(
                ids.to(self.device), mask.to(self.device), kept, parallel_windows=PARALLEL_WINDOWS
            )
            for logits, number in zip(read, numbers, strict=True):
                key, _, continuation = requests[number]
                logits = logits.float().log_softmax(dim=-1)
                target = torch.tensor(continuation, device=logits.device)
                likelihood = float(logits.gather(1, target[:, None]).sum())
                found[number] = likelihood, bool((logits.argmax(dim=-1) == target).all())
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, found[number])
                bar.update()
        bar.close()
        return found


if __name__ == "__main__":
    cli_evaluate()
