"""How well a model predicts documents, by protocol.

disjoint            windows read apart from each other
overlap             windows that begin half a window, or a given stride, apart; each scores what none before it has
recurrent           windows read one after another, with the memory of the one before
recurrent+overlap   two recurrent readings half a window apart; a token is scored in the one with more in front of it

Controls: `zeroed`, every window read without memory; `shuffled`, with the memory that another document's window left.

In every protocol each token of a document but its first is scored exactly once, tails included. Word perplexity and
bits per byte divide the same total loss by words and bytes of the text, so that they compare across tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from ..data.batches import Lanes
from ..errors import InputError, check_range
from ..models.flops import flops_per_token
from ..models.modeling import RecurGPT2LMHeadModel
from ..models.state import RecurState
from ..ops.cross_entropy import token_losses
from ..ops.matmul import weight_of
from ..utils.measure import Meter
from ..utils.tensors import IGNORE_INDEX
from .arguments import PARALLEL_WINDOWS
from .protocols import PROTOCOLS

RESAMPLES = 2000


@dataclass
class Evaluation:
    """The loss of every scored token, and what it took.

    Attributes:
        losses: nats per token, one array (n - 1,) a document, in the given order.
        words, bytes: (documents,) whitespace-separated words and UTF-8 bytes of each text.
        by_position: (T,) mean nats by position in the window; NaN where nothing is scored, and in the first half of
            windows that overlap, where only the first window of a document is.
        tokens_read: tokens that went through the model, for all those scored; twice, if it read them twice.
        flops_per_token: forward FLOPs per scored token.
        seconds, peak_memory_bytes: as measured.
    """

    losses: list[np.ndarray]
    words: np.ndarray
    bytes: np.ndarray
    by_position: np.ndarray
    tokens_read: int
    flops_per_token: float
    seconds: float
    peak_memory_bytes: int | None

    @property
    def nats(self) -> float:
        """Mean loss per token."""
        return float(self._sums().sum() / self._counts().sum())

    def nats_interval(self, other: Evaluation | None = None, level: float = 0.95) -> tuple[float, float]:
        """Bootstrap interval over documents of the mean loss, or of its difference to `other`'s on the same ones."""
        sums = self._sums() - (other._sums() if other is not None else 0)
        draws = resample(len(sums))
        means = sums[draws].sum(axis=1) / self._counts()[draws].sum(axis=1)
        return tuple(float(q) for q in np.quantile(means, [(1 - level) / 2, (1 + level) / 2]))

    def row(self, name: str, protocol: str, window: int, words: int | None = None) -> dict:
        """The numbers as a row of results.json. `words`: to divide by, in place of those counted."""
        total, tokens = self._sums().sum(), int(self._counts().sum())
        return {
            "name": name,
            "protocol": protocol,
            "window": window,
            "tokens": tokens,
            "nats": self.nats,
            "nats_interval": list(self.nats_interval()),
            "token_ppl": _exp(total / tokens),
            "word_ppl": _exp(total / (words or self.words.sum())),
            "bits_per_byte": float(total / math.log(2) / self.bytes.sum()),
            "flops_per_token": self.flops_per_token,
            "peak_memory_bytes": self.peak_memory_bytes,
            "tokens_per_second": tokens / self.seconds,
        }

    def _sums(self):
        return np.array([losses.sum() for losses in self.losses])

    def _counts(self):
        return np.array([len(losses) for losses in self.losses])


def gap_covered_interval(disjoint: Evaluation, overlap: Evaluation, recurrent: Evaluation, level=0.95):
    """Bootstrap interval over documents of the part of the way from disjoint to overlap that recurrent covers."""
    return share_covered_interval(*(each._sums() for each in (disjoint, overlap, recurrent)), level=level)


def share_covered_interval(disjoint: np.ndarray, overlap: np.ndarray, recurrent: np.ndarray, level: float = 0.95):
    """The same from the summed losses of each document, (documents,) each."""
    draws = resample(len(disjoint))
    total = [sums[draws].sum(axis=1) for sums in (disjoint, overlap, recurrent)]
    covered = (total[0] - total[2]) / (total[0] - total[1])
    return tuple(float(q) for q in np.quantile(covered, [(1 - level) / 2, (1 + level) / 2]))


def resample(documents: int) -> np.ndarray:
    """(RESAMPLES, documents) indices, drawn with replacement; the same ones for every evaluation of as many."""
    return np.random.default_rng(0).integers(documents, size=(RESAMPLES, documents))


def evaluate(
    model: RecurGPT2LMHeadModel,
    documents: Iterable[np.ndarray],
    tokenizer,
    *,
    protocol: str,
    stride: int | None = None,
    lanes: int = 8,
    parallel_windows: int = PARALLEL_WINDOWS,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Evaluation:
    """Score documents.

    Args:
        documents: token ids (n,) each, n >= 2.
        tokenizer: to count words and bytes of the texts that the ids stand for.
        protocol: one of PROTOCOLS.
        stride: of overlap alone, 1 to a window; None: half a window.
        lanes: documents read side by side.
        parallel_windows: P, windows of a document computed at once.
        dtype: run under autocast to this type.
        progress: show a bar.

    Raises:
        InputError: an unknown protocol, a stride out of range, no documents, or one with nothing to predict.
    """
    documents = list(documents)
    how = _checked(documents, protocol)
    check_range(1, model.config.window, stride=stride)
    reader = _Reader(model, lanes, parallel_windows, dtype, progress)
    window = model.config.window
    with Meter(model) as measured:
        if how.passes == 2 and not how.recurrent:
            losses, positions = _read_overlapping(reader, documents, window, stride or max(1, window // 2))
        else:
            losses = reader.shuffled(documents) if how.other_documents else reader.read(documents, how.recurrent)
            positions = [np.arange(len(each)) % window for each in losses]
        if how.passes == 2 and how.recurrent:
            halves = [tokens[window // 2 :] for tokens in documents if _overlaps(tokens, window)]
            later = reader.read(halves, how.recurrent)
            losses, positions = _merge(losses, later, documents, window)
            # A document's first window is the only one scored in its first half: too few tokens to show by position.
            positions = [np.where(position < window // 2, window, position) for position in positions]
    texts = [tokenizer.decode(tokens) for tokens in documents]
    scored = sum(map(len, losses))
    return Evaluation(
        losses=losses,
        words=np.array([len(text.split()) for text in texts]),
        bytes=np.array([len(text.encode()) for text in texts]),
        by_position=_mean_by_position(losses, positions, window),
        tokens_read=reader.tokens,
        flops_per_token=reader.flops(memory=how.recurrent) / scored,
        seconds=measured.seconds,
        peak_memory_bytes=measured.peak_memory_bytes,
    )


def _checked(documents, protocol):
    """The protocol of that name, if it can be scored on these."""
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol={protocol!r} is not known; use one of {', '.join(PROTOCOLS)}")
    if not documents:
        raise InputError("there are no documents to evaluate; give at least one")
    short = next((n for n, tokens in enumerate(documents) if len(tokens) < 2), None)
    if short is not None:
        raise InputError(f"document {short} has {len(documents[short])} tokens; at least 2 are needed to predict one")
    return PROTOCOLS[protocol]


class _Reader:
    """Walks documents through a model and collects the loss of every token.

    Attributes:
        tokens: read so far.
        predicted: those of them whose successors were predicted: the LM head's share.
    """

    def __init__(self, model, lanes, parallel_windows, dtype, progress):
        self.model, self.lanes, self.parallel_windows = model, lanes, parallel_windows
        self.dtype, self.progress = dtype, progress
        self.device = next(model.parameters()).device
        self.tokens = self.predicted = 0

    def flops(self, *, memory):
        """Forward FLOPs so far, as if every window had been full."""
        config = self.model.config
        head = 2 * config.n_embd * config.vocab_size
        return (flops_per_token(config, memory=memory) - head) * self.tokens + head * self.predicted

    def read(self, documents, recurrent):
        """Nats per token of each document, (n - 1,) each."""
        state = None

        def step(segment):
            nonlocal state
            starts = segment.starts if recurrent else torch.ones_like(segment.starts)
            *read, state = self._read(segment, starts, state)
            return read

        return self._losses(documents, self.parallel_windows, step)

    def shuffled(self, documents):
        """The same, each window with the memory that another lane's last full window left.

        Memory is made by a true reading of each document beside the scored one, so that only its owner is wrong.
        """
        if len(documents) < 2:
            raise InputError("a shuffled state needs at least 2 documents; give more, or leave this protocol out")
        self.lanes = max(2, self.lanes)  # a single lane would be its own neighbour
        lanes = min(self.lanes, len(documents))
        true = RecurState.empty(lanes)

        def step(segment):
            nonlocal true
            other = true.select([*range(1, lanes), 0])
            *read, _ = self._read(segment, segment.starts, other)
            *_, after = self._read(segment, segment.starts, true)
            full = (segment.targets[:, 0, -1] != IGNORE_INDEX).cpu().nonzero().squeeze(1)
            true = true.merge(full, after.select(full))
            return read

        return self._losses(documents, 1, step)

    def _read(self, segment, starts, state):
        """-> hidden states, shares of a mixture, state"""
        self.tokens += segment.scored
        return self.model.read_windows(segment.input_ids, segment.targets, starts, state)

    @torch.no_grad()  # in inference mode autocast would cast all weights again at every reading
    def _losses(self, documents, windows, step):
        was_training = self.model.training
        self.model.eval()
        order = sorted(range(len(documents)), key=lambda n: -len(documents[n]))
        length = self.model.config.window
        lanes = Lanes((documents[n] for n in order), lanes=min(self.lanes, len(order)), window=length)
        losses = [np.empty(len(tokens) - 1, np.float32) for tokens in documents]
        head = weight_of(self.model.lm_head)
        head = head if self.dtype is None else head.to(self.dtype)
        bar = tqdm(total=sum(map(len, losses)), unit="tok", unit_scale=True, disable=not self.progress, leave=False)
        autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)
        try:
            with bar, autocast:  # around all readings: it keeps the cast weights until its end
                while (segment := lanes.segment(windows)) is not None:
                    segment = segment.to(self.device)
                    hidden, shares = step(segment)
                    nats = token_losses(hidden.to(head.dtype), head, segment.targets, shares)
                    self._collect(losses, order, segment, nats.cpu().numpy())
                    self.predicted += segment.scored
                    bar.update(segment.scored)
        finally:
            self.model.train(was_training)
        return losses

    def _collect(self, losses, order, segment, nats):
        length = nats.shape[-1]
        for lane, step in np.argwhere(segment.document.numpy() >= 0):
            target = losses[order[segment.document[lane, step]]]
            first = int(segment.window[lane, step]) * length
            target[first : first + length] = nats[lane, step, : len(target) - first]


def _read_overlapping(reader, documents, window, stride):
    """Windows `stride` tokens apart, each by itself -> nats of each document's tokens; and their positions in the
    window that scored them, `window` where few are scored at that position, all of them in first windows."""
    starts = [range(0, max(1, len(tokens) - 1 - window + stride), stride) for tokens in documents]
    pieces = [
        tokens[start : start + window + 1] for tokens, own in zip(documents, starts, strict=True) for start in own
    ]
    read = iter(reader.read(pieces, False))
    losses, positions = [], []
    for own in starts:
        parts = [next(read) for _ in own]
        skipped = [0] + [window - stride] * (len(parts) - 1)  # what the window before has scored
        losses.append(np.concatenate([part[skip:] for part, skip in zip(parts, skipped, strict=True)]))
        position = np.concatenate([np.arange(skip, len(part)) for part, skip in zip(parts, skipped, strict=True)])
        positions.append(np.where(position < window - stride, window, position))
    return losses, positions


def _overlaps(tokens, window):
    """Whether a document has a second window, and so tokens that a reading half a window later scores better."""
    return len(tokens) - 1 > window


def _merge(losses, later, documents, window):
    """Each token from the reading in which more of its window lies before it; and its position there."""
    later = iter(later)
    half, merged, positions = window // 2, [], []
    for tokens, first in zip(documents, losses, strict=True):
        position = np.arange(len(first)) % window
        if _overlaps(tokens, window):
            second = np.concatenate((np.full(half, np.nan, np.float32), next(later)))
            position_in_second = (np.arange(len(first)) - half) % window
            better = (position_in_second > position) & (np.arange(len(first)) >= window)
            first, position = np.where(better, second, first), np.where(better, position_in_second, position)
        merged.append(first)
        positions.append(position)
    return merged, positions


def _mean_by_position(losses, positions, window):
    sums, counts = np.zeros(window + 1), np.zeros(window + 1)  # the last one: not to be shown
    for loss, position in zip(losses, positions, strict=True):
        sums += np.bincount(position, loss, window + 1)
        counts += np.bincount(position, minlength=window + 1)
    sums, counts = sums[:window], counts[:window]
    return np.divide(sums, counts, out=np.full(window, np.nan), where=counts > 0)


def _exp(nats):
    return math.exp(nats) if nats < 700 else math.inf
