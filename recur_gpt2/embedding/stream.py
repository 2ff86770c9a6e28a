"""The vector of a text that grows: a log, a transcript. What was read of it is kept as a state, and not read again."""

from __future__ import annotations

import numpy as np
import torch

from ..data.tokenization import Encoder
from ..models.modeling import RecurGPT2Model
from .batching import Reader
from .pooling import pool

PENDING = 8  # characters for each token of a window that wait to be read together


class EmbeddingStream:
    """Text in, vector out, as if all of the text had been given at once.

    A piece of text may end inside a word: what follows decides which tokens it becomes. So the last word waits until
    white space follows it, and until then is read for `embedding` alone. With a tokenizer that may look across white
    space, the whole text waits.
    """

    def __init__(
        self,
        model: RecurGPT2Model,
        encoder: Encoder,
        *,
        pooling: str,
        layer: int,
        batch_tokens: int,
        normalize: bool,
    ):
        """Made by `DocumentEmbedder.stream`."""
        self._model, self._encoder = model, encoder
        self._pooling, self._layer, self._normalize = pooling, layer, normalize
        self._reader = Reader(model, layer, batch_tokens)
        self._reading, self._text = self._reader.start(1), ""

    @torch.no_grad()
    def add(self, text: str) -> None:
        """More of the text. A window's worth at a time is read."""
        self._text += text
        if len(self._text) > PENDING * self._model.config.window:
            self._settle()

    @torch.no_grad()
    def embedding(self) -> np.ndarray:
        """(D,) float32 of all text so far; zero before the first."""
        self._settle()
        reading = self._read(self._reading, self._text)
        vectors = pool(self._model, reading, self._pooling, self._layer, normalize=self._normalize)
        return vectors[0].cpu().numpy()

    def _settle(self):
        """Read what no further text can change."""
        settled = self._encoder.settled(self._text)
        self._reading = self._read(self._reading, self._text[:settled])
        self._text = self._text[settled:]

    def _read(self, reading, text):
        for ids in self._encoder.stream(text):
            for start in range(0, len(ids), self._reader.batch_tokens):
                reading, _ = self._reader.step(reading, [ids[start : start + self._reader.batch_tokens]])
        return reading
