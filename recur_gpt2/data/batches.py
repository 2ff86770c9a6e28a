"""Documents -> lanes of windows: what training and evaluation iterate over.

A lane walks one document after another, window by window. Each position of a window is an input whose target is the
document's next token, so that every token but a document's first is a target exactly once; the last window of a
document is padded and masked, never dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..utils.tensors import IGNORE_INDEX


class DocumentSource(Protocol):
    """What lanes are filled from, as a `corpora.Corpus` is: to import that takes the libraries that it reads with.

    Attributes:
        num_documents: None where only reading them all can tell.
        fingerprint: another one for other documents.
    """

    num_documents: int | None
    fingerprint: str

    def documents(self, seed: int | None = None, epoch: int = 0, skip: int = 0) -> Iterator[np.ndarray]:
        """Token ids (n,) of each document of an epoch, without the first `skip`, in the order that the seed makes."""


@dataclass
class Segment:
    """K windows of each of B lanes.

    Attributes:
        input_ids: (B, K, T) int64; 0 behind a document's end.
        targets: (B, K, T) int64; -100 behind a document's end.
        starts: (B, K) bool, whether a document starts at the window. An idle window counts as one too.
        document: (B, K) int64, number of the document in the lanes' order; -1 where a lane is idle.
        window: (B, K) int64, number of the window in its document.
    """

    input_ids: Tensor
    targets: Tensor
    starts: Tensor
    document: Tensor
    window: Tensor

    @property
    def scored(self) -> int:
        """Targets that count."""
        return int((self.targets != IGNORE_INDEX).sum())

    def to(self, device: torch.device | str) -> Segment:
        """Tokens on the device; what decisions are made from stays on the CPU."""
        moved = self.input_ids.to(device), self.targets.to(device)
        return Segment(*moved, self.starts, self.document, self.window)


@dataclass
class _Lane:
    tokens: np.ndarray | None = None
    document: int = -1
    window: int = 0


@dataclass
class LanePosition:
    """Where lanes stand, to go on from there: per lane its document's number (-1: none) and next window."""

    document: list[int] = field(default_factory=list)
    window: list[int] = field(default_factory=list)
    taken: int = 0


class Lanes:
    """Endless (for training) or single (for evaluation) walk of B lanes over documents.

    Whenever a lane is through with a document it takes the next one of the order that all lanes share, so the walk
    is a function of the documents and their order alone.
    """

    def __init__(self, documents: Iterator[np.ndarray], *, lanes: int, window: int):
        """`documents`: token ids (n,) one document at a time, n >= 2, in the order of the walk."""
        self._documents, self._window = iter(documents), window
        self._lanes = [_Lane() for _ in range(lanes)]
        self._taken = 0

    def segment(self, windows: int) -> Segment | None:
        """The next `windows` windows of each lane; None once no lane has any left."""
        lanes, length = len(self._lanes), self._window
        input_ids = np.zeros((lanes, windows, length), np.int64)
        targets = np.full((lanes, windows, length), IGNORE_INDEX, np.int64)
        document = np.full((lanes, windows), -1, np.int64)
        number = np.zeros((lanes, windows), np.int64)
        for step in range(windows):
            for row, lane in enumerate(self._lanes):
                if not self._has_window(lane):
                    continue
                first = lane.window * length
                piece = lane.tokens[first : first + length + 1]
                inputs = piece[:length]
                input_ids[row, step, : len(inputs)] = inputs
                targets[row, step, : len(piece) - 1] = piece[1:]
                document[row, step], number[row, step] = lane.document, lane.window
                lane.window += 1
        if (document < 0).all():
            return None
        tensors = map(torch.from_numpy, (input_ids, targets, (number == 0) | (document < 0), document, number))
        return Segment(*tensors)

    def __iter__(self) -> Iterator[Segment]:
        """One window at a time, until all documents are read."""
        while (segment := self.segment(1)) is not None:
            yield segment

    def position(self) -> LanePosition:
        """Where the walk stands, for `resume`."""
        return LanePosition([lane.document for lane in self._lanes], [lane.window for lane in self._lanes], self._taken)

    def _has_window(self, lane):
        if lane.tokens is None or lane.window * self._window >= len(lane.tokens) - 1:
            tokens = next(self._documents, None)
            lane.tokens, lane.document, lane.window = tokens, -1, 0
            if tokens is not None:
                lane.document, self._taken = self._taken, self._taken + 1
        return lane.tokens is not None

    def _restore(self, position: LanePosition, documents: dict[int, np.ndarray]):
        for lane, document, window in zip(self._lanes, position.document, position.window, strict=True):
            lane.tokens, lane.document, lane.window = documents.get(document), document, window
        self._taken = position.taken


class TrainingLanes(Lanes):
    """Lanes over a corpus, epoch after epoch, in an order that is a function of the seed. Can be resumed anywhere."""

    def __init__(
        self,
        corpus: DocumentSource,
        *,
        lanes: int,
        window: int,
        seed: int,
        position: LanePosition | None = None,
        share: tuple[int, int] = (0, 1),
    ):
        """`position`: from `position()` of the walk to go on with. `share`: (i, n) takes every n-th document only,
        from the i-th on, as process i of n.

        Raises:
            InputError: more lanes than documents, or no documents at all.
        """
        index, processes = share
        if corpus.num_documents is not None and lanes * processes > corpus.num_documents:
            fit = corpus.num_documents // processes
            way_out = f"use --lanes {fit} or less" if fit else "give more documents"
            raise InputError(f"lanes={lanes} exceeds the {fit} training documents of a process; {way_out}")
        first = 0 if position is None else min([*(n for n in position.document if n >= 0), position.taken])
        order = islice(_endless(corpus, seed, first * processes), index, None, processes)
        super().__init__(order, lanes=lanes, window=window)
        if position is not None:
            wanted = set(position.document)
            passed = ((number, next(order)) for number in range(first, position.taken))
            self._restore(position, {number: tokens for number, tokens in passed if number in wanted})


def _endless(corpus, seed, skip) -> Iterator[np.ndarray]:
    """Documents of one epoch after another, without the first `skip`."""
    epoch = 0
    if corpus.num_documents is not None:
        epoch, skip = divmod(skip, corpus.num_documents)
    while True:
        found = False
        for tokens in corpus.documents(seed=seed, epoch=epoch, skip=skip):
            found = True
            yield tokens
        if not found:  # a stream, whose length is not known before its end: the place lies in a later epoch
            length = sum(1 for _ in corpus.documents(seed=seed, epoch=epoch))
            if not length:
                raise InputError("there are no documents to train on; give at least one of two tokens or more")
            skip -= length
        else:
            skip = 0
        epoch += 1
