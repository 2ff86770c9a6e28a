"""A task that only memory solves: pairs of a key and a value, filler, and windows later the key again.

Each window of a document holds new pairs, at places of its own, and keys of pairs that stood 1, 2, 4, 8 or 16 windows
ago, behind each of which the same value is to be predicted; all else is filler, drawn at random from a few tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from recur_gpt2 import RecurGPT2Config, RecurGPT2LMHeadModel

DISTANCES = (1, 2, 4, 8, 16)  # windows
FILLER, KEYS, VALUES = 8, 96, 32
VOCABULARY = FILLER + KEYS + VALUES
NEW_PAIRS = 2  # a window


@dataclass
class RecallTask:
    """Documents of it. A DocumentSource for finetuning.

    Attributes:
        window: T.
        windows: of a document.
    """

    window: int
    windows: int = 40
    num_documents: int = 64
    fingerprint: str = "recall"

    def documents(self, seed: int | None = None, epoch: int = 0, skip: int = 0) -> Iterator[np.ndarray]:
        for number in range(skip, self.num_documents):
            yield self.document((seed or 0, epoch, number))[0]

    def document(self, seed) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (n + 1,); and (n,) windows since its pair stood there for each target that repeats one, else 0."""
        random = np.random.default_rng(seed)
        tokens = random.integers(FILLER, size=self.windows * self.window + 1)
        distances = np.zeros(len(tokens), int)
        pairs: list[list[tuple[int, int]]] = []
        unused = list(random.permutation(KEYS))
        for window in range(self.windows):
            # A key that was used comes back when no distance reaches its pair any more.
            new = [(unused.pop(0), int(random.integers(VALUES))) for _ in range(NEW_PAIRS)]
            if window >= max(DISTANCES) + 1:
                unused += [key for key, _ in pairs[window - max(DISTANCES) - 1]]
            old = [(d, pairs[window - d][random.integers(NEW_PAIRS)]) for d in DISTANCES if d <= window]
            pairs.append(new)
            written = [(0, pair) for pair in new] + old
            places = 2 * random.choice(self.window // 2, size=len(written), replace=False)
            for place, (distance, (key, value)) in zip(window * self.window + places, written, strict=True):
                tokens[place], tokens[place + 1] = FILLER + key, FILLER + KEYS + value
                distances[place + 1] = distance
        return tokens, distances[1:]


def recall_model(window: int, **memory) -> RecurGPT2LMHeadModel:
    """A small GPT-2 of random weights, with this memory."""
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 4 * window, "vocab_size": VOCABULARY}
    ends = {"bos_token_id": 0, "eos_token_id": 0} | dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    return RecurGPT2LMHeadModel(RecurGPT2Config(**shape, **ends, window=window, **memory))


@torch.no_grad()
def recalled(model: RecurGPT2LMHeadModel, task: RecallTask, documents: int) -> dict[int, float]:
    """Share of values that are the likeliest token where their keys return, by distance."""
    found = [task.document((1, 2**31, number)) for number in range(documents)]
    ids = torch.from_numpy(np.stack([tokens for tokens, _ in found]))
    distances = torch.from_numpy(np.stack([each for _, each in found]))
    likeliest = model.eval()(ids[:, :-1], parallel_windows=4).logits.argmax(dim=-1)
    right = likeliest == ids[:, 1:]
    return {distance: float(right[distances == distance].double().mean()) for distance in DISTANCES}
