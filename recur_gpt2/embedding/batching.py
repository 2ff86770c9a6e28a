"""Documents of any lengths, read side by side at constant memory: what pooling needs of each comes out.

Whole windows of many documents are read together, without a pad; what is left of each, shorter than a window, waits
until it can be read with others of nearly its length. Each document gets what it gets alone.
B documents, N tokens, T tokens a window, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..models.modeling import RecurGPT2Model
from ..models.state import RecurState
from ..utils.itertools import batched
from ..utils.tensors import widen

SLACK = 0.1  # part of a batch that may be pads
FREE_SLACK = 128  # pads that are cheaper than another call
WAITING = 64  # times as many documents as are read side by side may wait for their last tokens; with memory, twice


class Tokens:
    """The tokens of one document, tokenised when they are needed: rows (n,) of ids, or (n, 3) with offsets."""

    def __init__(self, blocks: Iterator[np.ndarray]):
        self._blocks, self._held, self._count = blocks, [], 0

    def fill(self, count: int) -> int:
        """Have up to `count` tokens at hand -> how many are."""
        while self._count < count and (block := next(self._blocks, None)) is not None:
            self._held.append(block)
            self._count += len(block)
        return min(self._count, count)

    def take(self, count: int) -> np.ndarray:
        """The next `count` tokens, or what is left."""
        count = self.fill(count)
        held = np.concatenate(self._held) if self._held else np.empty(0, np.int32)
        self._held, self._count = [held[count:]], len(held) - count
        return held[:count]


@dataclass(frozen=True)
class Reading:
    """What was read of B documents so far.

    Attributes:
        state: to go on from.
        tokens: (B,) int64 on the CPU, how many.
        sums: (B, D) float64, of their hidden states.
        last: (B, D), hidden state of the last one; zero where there is none.
    """

    state: RecurState
    tokens: Tensor
    sums: Tensor
    last: Tensor

    def select(self, rows: list[int]) -> Reading:
        """The given documents, in this order."""
        index = torch.tensor(rows, dtype=torch.int64)
        there = index.to(self.sums.device)
        return Reading(self.state.select(index), self.tokens[index], self.sums[there], self.last[there])

    @classmethod
    def join(cls, readings: Sequence[Reading]) -> Reading:
        """All these documents, in this order."""
        rest = (torch.cat([getattr(each, name) for each in readings]) for name in ("tokens", "sums", "last"))
        return cls(RecurState.join([each.state for each in readings]), *rest)


class Reader:
    """Reads documents with the first `layer` layers of a model.

    Attributes:
        padded: pads that went through the model so far; `read` counts all positions, them included.
    """

    def __init__(self, model: RecurGPT2Model, layer: int, batch_tokens: int):
        self.model, self.layer, self.batch_tokens = model, layer, batch_tokens
        self.rows = max(1, batch_tokens // model.config.window)  # documents side by side
        self.read = self.padded = 0

    def start(self, documents: int) -> Reading:
        """Nothing read yet."""
        zeros = torch.zeros(documents, self.model.config.n_embd, device=self.model.device)
        state, tokens = RecurState.empty(documents), torch.zeros(documents, dtype=torch.int64)
        return Reading(state, tokens, zeros.double(), zeros)

    def step(self, reading: Reading, ids: Sequence[np.ndarray]) -> tuple[Reading, Tensor]:
        """Read some tokens, at least one, of each document -> hidden states (B, N, D) too, zero at pads."""
        lengths = torch.tensor([len(each) for each in ids])
        longest, device = int(lengths.max()), self.model.device
        batch, inside = np.zeros((len(ids), longest), np.int64), torch.arange(longest) < lengths[:, None]
        for row, each in zip(batch, ids, strict=True):
            row[: len(each)] = each
        out = self.model(
            torch.from_numpy(batch).to(device),
            None if bool(inside.all()) else inside.to(device),
            reading.state,
            parallel_windows=max(1, longest // self.model.config.window),
            layer=self.layer,
            return_dict=True,
        )
        hidden = out.last_hidden_state
        sums = reading.sums + widen(hidden).sum(dim=1).double()
        last = hidden[torch.arange(len(ids), device=device), lengths.to(device) - 1]
        self.read += batch.size
        self.padded += batch.size - int(lengths.sum())
        return Reading(out.state, reading.tokens + lengths, sums, last), hidden

    def documents(
        self, documents: Iterable[tuple[int, Tokens]], report: Callable[[int, int], None] = lambda *_: None
    ) -> Iterator[tuple[list[int], Reading]]:
        """Read numbered documents to their ends -> numbers and readings of those that ended, in any order.

        Args:
            documents: long ones first, or few of them will be read side by side in the end.
            report: called with a document's number and how many of its tokens were read now.
        """
        tails: list[_Tails] = []
        for group in batched(documents, self.rows):
            for tail in self._whole_windows(group, report):
                tails.append(tail)
                with_memory = sum(len(each.numbers) for each in tails if each.has_memory)
                if with_memory > 2 * self.rows or sum(len(each.numbers) for each in tails) > WAITING * self.rows:
                    yield from self._ends(tails, report)
                    tails = []
        yield from self._ends(tails, report)

    def all(
        self,
        lengths: Sequence[int],
        tokens: Callable[[int], Tokens],
        report: Callable[[int, int], None] = lambda *_: None,
    ) -> Iterator[tuple[list[int], Reading]]:
        """`documents`, of numbers 0 to n - 1, put in the order that it wants.

        Args:
            lengths: n numbers, in any unit.
            tokens: a document's number -> its tokens; called when its turn comes.
        """
        order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
        return self.documents(((number, tokens(number)) for number in order), report)

    def _whole_windows(self, group, report):
        """Read all whole windows of some documents -> what is left of each."""
        window, reading = self.model.config.window, self.start(len(group))
        while group:
            at_once = max(1, self.batch_tokens // (len(group) * window))
            windows = [tokens.fill(at_once * window) // window for _, tokens in group]
            going, ended = ([row for row, n in enumerate(windows) if (n > 0) is more] for more in (True, False))
            if ended:
                rest = [group[row] for row in ended]
                tails = [tokens.take(window) for _, tokens in rest]
                yield _Tails([number for number, _ in rest], tails, reading.select(ended))
                group, reading = [group[row] for row in going], reading.select(going)
            if group:
                count = min(windows[row] for row in going) * window
                reading, _ = self.step(reading, [tokens.take(count) for _, tokens in group])
                for number, _ in group:
                    report(number, count)

    def _ends(self, tails, report):
        """Read what is left of documents, in batches of nearly equal lengths."""
        if not tails:
            return
        numbers = [number for each in tails for number in each.numbers]
        ids = [rest for each in tails for rest in each.ids]
        reading = Reading.join([each.reading for each in tails])
        # A batch in which all documents have memory, or none has, takes the faster way through attention.
        order = sorted(range(len(ids)), key=lambda n: (bool(reading.state.windows[n] > 0), len(ids[n])), reverse=True)
        for rows in self._nearly_equal(order, [len(rest) for rest in ids]):
            some, lengths = reading.select(rows), [len(ids[row]) for row in rows]
            if lengths[0]:
                some, _ = self.step(some, [ids[row] for row in rows])
            for row, length in zip(rows, lengths, strict=True):
                report(numbers[row], length)
            yield [numbers[row] for row in rows], some

    def _nearly_equal(self, order, lengths):
        """Cut an order of documents, by length in blocks, into batches with few pads."""
        batch, pads = [], 0
        for row in order:
            if batch:
                longest, taken = lengths[batch[0]], lengths[batch[0]] * (len(batch) + 1)
                more = longest - lengths[row]
                fits = more >= 0 and taken <= self.batch_tokens and pads + more <= max(FREE_SLACK, SLACK * taken)
                if not fits or (lengths[row] == 0) is not (longest == 0):
                    yield batch
                    batch, pads, more = [], 0, 0
                pads += more
            batch.append(row)
        yield batch


@dataclass
class _Tails:
    """Documents with fewer tokens left than a window has."""

    numbers: list[int]
    ids: list[np.ndarray]
    reading: Reading

    @property
    def has_memory(self):
        return bool(self.reading.state.memory)
