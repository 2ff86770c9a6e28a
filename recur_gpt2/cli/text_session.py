"""A document that is read and written on in turns, and can be put aside: what `recur-gpt2 generate` does.

Its file is a RecurState's, which `RecurState.load` reads, with the last token and the logits behind it beside it: from
those the next token is taken, so that text goes on where it was left, without a prompt. Not for batches.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..errors import InputError
from ..models.cache import RecurCache
from ..models.modeling import RecurGPT2LMHeadModel
from ..models.state import RecurState

LONGEST_CHARACTER = 4  # bytes of one in UTF-8, and so the most tokens that one is spread over


class TextSession:
    """One document of one model.

    Attributes:
        state: after all that was read and written; None before the first token.
    """

    def __init__(self, model: RecurGPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model, tokenizer
        self._cache: RecurCache | None = None
        self._last: Tensor | None = None  # (1, 1), the last token read
        self._logits: Tensor | None = None  # (1, 1, V) behind it

    @property
    def state(self) -> RecurState | None:
        return None if self._cache is None else self._cache.state()

    @torch.no_grad()
    def read(self, ids: Sequence[int], *, progress: bool = False) -> None:
        """Read tokens, any number of them."""
        if not len(ids):
            return
        *before, last = ids
        state = self.model.read(before, self.state, progress=progress) if before else self.state
        self._cache = RecurCache(self.model, RecurState.empty(1) if state is None else state)
        self._read_last(torch.tensor([[last]], device=self.model.device))

    @torch.no_grad()
    def write(self, max_new_tokens: int, stream: Callable[[str], None], **options) -> int:
        """Write on, after what was read. Ctrl-C stops between two tokens, and so does a `stream` that raises
        BrokenPipeError, since nobody reads it any more.

        Args:
            max_new_tokens: at most.
            stream: called with each piece of text as it comes.
            options: of transformers' `generate`: sampling, and what ends a text.

        Returns:
            How many tokens were written.

        Raises:
            InputError: nothing was read yet.
        """
        if self._cache is None:
            raise InputError("there is nothing to go on from; read a prompt first, if only the token that starts texts")
        self._cache.seen, self._cache.held = 0, self._logits
        with _stopping_between_tokens() as stop:
            out = self.model.generate(
                self._last,
                attention_mask=torch.ones_like(self._last),
                cache=self._cache,
                max_new_tokens=max_new_tokens,
                streamer=TextStream(self.tokenizer, partial(_unless_closed, stream, stop)),
                stopping_criteria=StoppingCriteriaList([stop]),
                pad_token_id=self.tokenizer.eos_token_id,
                **options,
            )
        self._read_last(out[:, -1:])
        return out.shape[1] - 1

    def save(self, path: str | Path) -> None:
        """Put the document aside."""
        self.state.save(path, {"last.token": self._last[0], "last.logits": self._logits[0]})

    def load(self, path: str | Path) -> None:
        """Go on with a document that `save`, or RecurState.save, wrote.

        Raises:
            InputError: it is not readable, of several documents, or of another model.
        """
        state = RecurState.load(path, self.model.device)
        if state.batch_size != 1:
            raise InputError(f"{path} holds the states of {state.batch_size} documents; save one, state.select([row])")
        self._cache = RecurCache(self.model, state)
        with safe_open(path, "pt", device=str(self.model.device)) as file:
            names = set(file.keys())
            if "last.token" in names:
                self._last = file.get_tensor("last.token")[None]
                if "last.hidden" in names:  # of models that could not point
                    self._logits = self.model.lm_head(file.get_tensor("last.hidden")[None].to(self.model.dtype))
                else:
                    self._logits = file.get_tensor("last.logits")[None]

    @property
    def can_write(self) -> bool:
        """Whether there is something to go on from; a state that RecurState.save wrote wants a prompt first."""
        return self._last is not None

    def _read_last(self, token):
        self._last, self._logits = token, self.model.step(self._cache, token)


def _unless_closed(stream, stop, text):
    try:
        stream(text)
    except BrokenPipeError:
        stop.wanted = True


class TextStream(BaseStreamer):
    """Tokens, as they come, to text, as soon as it is whole characters. The prompt is not repeated.

    transformers' TextStreamer decodes all of a line again for each token, and a line may be a chapter here.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stream: Callable[[str], None]):
        self.tokenizer, self.stream = tokenizer, stream
        self.pending: list[int] = []
        self.is_prompt = True

    def put(self, value: Tensor) -> None:
        if self.is_prompt:
            self.is_prompt = False
            return
        self.pending += value.flatten().tolist()
        text = self._text()
        if not text.endswith("\N{REPLACEMENT CHARACTER}") or len(self.pending) > LONGEST_CHARACTER:
            self._emit(text)

    def end(self) -> None:
        if self.pending:
            self._emit(self._text())

    def _text(self):
        return self.tokenizer.decode(self.pending, clean_up_tokenization_spaces=False)

    def _emit(self, text):
        self.stream(text)
        self.pending = []


class _Stop(StoppingCriteria):
    def __init__(self):
        self.wanted = False

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.wanted, device=input_ids.device)


@contextmanager
def _stopping_between_tokens():
    """The first Ctrl-C asks to stop, so that no token is left half read; a second one is as ever."""
    stop = _Stop()

    def ask(*_):
        stop.wanted = True
        signal.signal(signal.SIGINT, before)

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not in the main thread, where no signal arrives
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
