"""DocumentEmbedder: vectors of documents of any length, their tokens, windows and passages, at constant memory.

An empty document has the zero vector, which is similar to nothing.
N documents, n tokens or vectors, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..data.bundle import BATCH_TOKENS, POOLING
from ..data.tokenization import Encoder
from ..errors import InputError, check_range
from ..models.hub import load_tokenizer
from ..models.loading import load_any
from ..models.modeling import RecurGPT2LMHeadModel
from ..utils.device import checked_device
from ..utils.itertools import batched_by_size
from .batching import Reader, Tokens
from .pooling import check_pooling, dimension, pool
from .stream import EmbeddingStream

# Chosen by measurement (docs/embedding.md): documents by the mean over a layer two thirds of the way up; tokens, and
# what lies within a document, by the last one, which knows most of what came before.
HEIGHT, INSIDE = 2 / 3, -1
CHUNK_BATCHES = 256  # batches' worth of text that encode_iter sorts by length at a time
CHARACTERS_PER_TOKEN = 4  # about; English


class TokenVectors(NamedTuple):
    """One window of a document: ids (n,), vectors (n, D) float32, offsets (n, 2), characters [start, end) of each."""

    ids: np.ndarray
    vectors: np.ndarray
    offsets: np.ndarray


class WindowVectors(NamedTuple):
    """All windows of a document: vectors (n, D) float32, spans (n, 2), characters [start, end) of each."""

    vectors: np.ndarray
    spans: np.ndarray


class DocumentEmbedder:
    """A model and its tokenizer, for embedding.

    Attributes:
        model: RecurGPT2LMHeadModel, in evaluation mode.
        tokenizer: of transformers.
        encoder: texts to ids by it, piece by piece.

    Arguments that several methods share:
        pooling: "mean" of the hidden states of all tokens; "last", the last token's; "memory", what the last full
            window left for the next one (zero for a document shorter than a window); or "mean+memory", both at unit
            length, one behind the other: twice as wide.
        layer: whose output it is, 1 to the number of layers, 0 for the embeddings; negative ones count from the last,
            -1. Default: for vectors of documents None, the one two thirds of the way up; for those of tokens, windows
            and passages the last. As transformers' `hidden_states`, the final norm is applied to the last layer
            alone. Layers above are not computed.
        normalize: scale each vector to unit length.
        batch_tokens: tokens that go through the model at once: memory against speed.
    """

    def __init__(self, model: RecurGPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.encoder = Encoder(tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        folder: str,
        window: int | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> DocumentEmbedder:
        """One of our models, or a GPT-2, which then reads windows apart from each other.

        Args:
            folder: or hub id.
            window: T; default: the model's own, or 256 for a GPT-2.
            device: default: a GPU if there is one.
            dtype: of weights and computation; default float32. Vectors come out in float32.

        Raises:
            InputError: there is no such model or device, or it was made for another window.
        """
        device = checked_device(device)
        model, tokenizer = load_any(str(folder), window), load_tokenizer(str(folder))
        return cls(model.to(device, _dtype(dtype)), tokenizer)

    def dimension(self, pooling: str = POOLING) -> int:
        """Numbers a vector."""
        return dimension(self.model.transformer, pooling)

    def encode(
        self,
        documents: str | Iterable[str],
        *,
        pooling: str = POOLING,
        layer: int | None = None,
        normalize: bool = False,
        batch_tokens: int = BATCH_TOKENS,
        show_progress_bar: bool | None = None,
        convert_to: str = "numpy",
    ) -> np.ndarray | torch.Tensor:
        """One vector a document.

        Args:
            show_progress_bar: None shows one on a terminal.
            convert_to: "numpy" or "torch".

        Returns:
            (N, D) float32 in the order of the documents, on the CPU; (D,) for a string.

        Raises:
            InputError: a document is no string, or an argument is out of range.
        """
        if convert_to not in ("numpy", "torch"):
            raise InputError(f"convert_to={convert_to!r} is not known; use numpy or torch")
        texts = [documents] if isinstance(documents, str) else list(documents)
        options = self.check(pooling, layer, batch_tokens) | {"normalize": normalize}
        _check_texts(texts)
        vectors = np.zeros((len(texts), self.dimension(pooling)), np.float32)
        with _Progress(texts, show_progress_bar) as progress:
            for numbers, found in self._read(texts, progress, **options):
                vectors[numbers] = found
        vectors = vectors[0] if isinstance(documents, str) else vectors
        return torch.from_numpy(vectors) if convert_to == "torch" else vectors

    def encode_iter(
        self,
        documents: Iterable[str],
        *,
        pooling: str = POOLING,
        layer: int | None = None,
        normalize: bool = False,
        batch_tokens: int = BATCH_TOKENS,
    ) -> Iterator[np.ndarray]:
        """The vectors (D,) float32 of documents that need not fit in memory, one after another.

        They are taken as they are needed: some 256 batches' worth of text at a time, which is sorted by length.
        """
        options = self.check(pooling, layer, batch_tokens) | {"normalize": normalize}
        tokens = CHUNK_BATCHES * batch_tokens
        chunks = batched_by_size(documents, _characters, CHARACTERS_PER_TOKEN * tokens, most=max(1, tokens // 16))
        return self._encode_chunks(chunks, options)

    def encode_tokens(
        self, document: str, *, layer: int | None = INSIDE, batch_tokens: int = BATCH_TOKENS
    ) -> Iterator[TokenVectors]:
        """A contextual vector for each token, with all the document before it as context, window by window."""
        layer = self.check("mean", layer, batch_tokens)["layer"]
        _check_texts([document])
        return self._walk(document, layer, batch_tokens)

    def encode_windows(
        self, document: str, *, layer: int | None = INSIDE, normalize: bool = False, batch_tokens: int = BATCH_TOKENS
    ) -> WindowVectors:
        """For each window the mean of its tokens' vectors, and the characters that it covers."""
        vectors, spans = [np.empty((0, self.dimension()), np.float32)], [np.empty((0, 2), np.int64)]
        for window in self.encode_tokens(document, layer=layer, batch_tokens=batch_tokens):
            vectors.append(window.vectors.mean(axis=0, keepdims=True))
            spans.append([[window.offsets[:, 0].min(), window.offsets[:, 1].max()]])
        return WindowVectors(_unit(np.concatenate(vectors), normalize), np.concatenate(spans))

    def encode_spans(
        self,
        document: str,
        spans: Sequence[tuple[int, int]],
        *,
        layer: int | None = INSIDE,
        normalize: bool = False,
        batch_tokens: int = BATCH_TOKENS,
    ) -> np.ndarray:
        """For each passage the mean of its tokens' vectors, with all the document before them as context.

        Args:
            spans: characters [start, end) each, in any order; they may overlap. A token that lies in a span in part
                counts.

        Returns:
            (n, D) float32.

        Raises:
            InputError: a span is empty, lies outside the document, or holds no token.
        """
        _check_texts([document])
        bounds = _checked_spans(document, spans)
        sums, counts = np.zeros((len(bounds), self.dimension())), np.zeros(len(bounds), np.int64)
        for window in self.encode_tokens(document, layer=layer, batch_tokens=batch_tokens):
            starts, ends = window.offsets.T
            here = np.flatnonzero((bounds[:, 0] < ends.max()) & (bounds[:, 1] > starts.min()))
            inside = (starts < bounds[here, 1:]) & (ends > bounds[here, :1])  # (spans here, n)
            sums[here] += inside @ window.vectors
            counts[here] += inside.sum(axis=1)
        if not counts.all():
            start, end = bounds[counts.argmin()]
            raise InputError(f"span ({start}, {end}) holds no token of the document; widen it, or leave it out")
        return _unit((sums / counts[:, None]).astype(np.float32), normalize)

    def stream(self, *, pooling: str = POOLING, layer: int | None = None, normalize: bool = False) -> EmbeddingStream:
        """A document that grows: what was read of it is not read again."""
        options = self.check(pooling, layer, BATCH_TOKENS) | {"normalize": normalize}
        return EmbeddingStream(self.model.transformer, self.encoder, **options)

    def check(self, pooling: str, layer: int | None, batch_tokens: int) -> dict:
        """The same arguments with the layer counted from 0; raises InputError for one that is out of range."""
        layer = checked_layer(self.model, layer)
        check_range(1, batch_tokens=batch_tokens)
        check_pooling(self.model.transformer, pooling, layer)
        return {"pooling": pooling, "layer": layer, "batch_tokens": batch_tokens}

    @torch.no_grad()
    def _read(self, texts, progress, *, pooling, layer, batch_tokens, normalize):
        """-> numbers of texts and their vectors, as they are read."""
        model = self.model.transformer
        reader, lengths = Reader(model, layer, batch_tokens), [len(text) for text in texts]
        for numbers, reading in reader.all(lengths, lambda n: Tokens(self.encoder.stream(texts[n])), progress):
            yield numbers, pool(model, reading, pooling, layer, normalize=normalize).cpu().numpy()

    def _encode_chunks(self, chunks, options):
        for texts in chunks:
            _check_texts(texts)
            waiting, following = {}, 0
            for numbers, vectors in self._read(texts, lambda *_: None, **options):
                waiting |= zip(numbers, vectors, strict=True)
                while following in waiting:
                    yield waiting.pop(following)
                    following += 1

    @torch.no_grad()
    def _walk(self, document, layer, batch_tokens):
        reader, window = Reader(self.model.transformer, layer, batch_tokens), self.model.config.window
        tokens, reading = Tokens(self.encoder.stream_with_offsets(document)), reader.start(1)
        while len(rows := tokens.take(max(1, batch_tokens // window) * window)):
            reading, hidden = reader.step(reading, [rows[:, 0]])
            vectors = hidden[0].float().cpu().numpy()
            for start in range(0, len(rows), window):
                here = slice(start, start + window)
                yield TokenVectors(rows[here, 0], vectors[here], rows[here, 1:])


def checked_layer(model: RecurGPT2LMHeadModel, layer: int | None) -> int:
    """The number of a layer that may be counted from the last one, or left open.

    Raises:
        InputError: there is no such layer.
    """
    layers = model.config.n_layer
    if layer is None:
        return max(1, round(HEIGHT * layers))
    if not -layers - 1 <= layer <= layers:
        raise InputError(f"layer={layer} does not exist; give 0, the embeddings, to {layers}, or -1 for the last")
    return layer % (layers + 1)


def _dtype(dtype):
    if dtype is None:
        return torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"dtype={dtype!r} is no floating-point type; use float32, bfloat16 or float16")
    return found


def _characters(text):
    return len(text) if isinstance(text, str) else 0  # what is no text is refused by number later


def _check_texts(texts):
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"document {number} is of type {type(text).__name__}; give a string")


def _checked_spans(document, spans):
    bounds = np.array(spans, np.int64).reshape(-1, 2)
    for start, end in bounds:
        if not 0 <= start < end <= len(document):
            raise InputError(
                f"span ({start}, {end}) is no part of a document of {len(document)} characters; give 0 <= start < end"
            )
    return bounds


def _unit(vectors, normalize):
    return torch.nn.functional.normalize(torch.from_numpy(vectors), dim=-1).numpy() if normalize else vectors


class _Progress:
    """A bar over the characters of the texts; those of a text that is being read are estimated from its tokens."""

    def __init__(self, texts, show):
        self._left = [len(text) for text in texts]
        disable = None if show is None else not show  # None: where the output is no terminal
        self._bar = tqdm(total=sum(self._left), unit="char", unit_scale=True, desc="embedding", disable=disable)

    def __call__(self, number, tokens):
        characters = min(self._left[number], CHARACTERS_PER_TOKEN * tokens)
        self._left[number] -= characters
        self._bar.update(characters)

    def __enter__(self):
        return self

    def __exit__(self, failure, *_):
        if failure is None:
            self._bar.update(sum(self._left))
        self._bar.close()
