"""How far back a model's memory reaches: the same windows, with states of the last h windows alone.

The first of the h windows is read as a continuation, with the state of an empty document, so that positions agree. A
gain that is all there at h = 2 is an overlap, and no memory of the document. B rows, W windows, T tokens a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from ..errors import InputError
from ..models.modeling import RecurGPT2LMHeadModel
from ..models.state import RecurState
from ..ops.cross_entropy import token_losses
from ..ops.matmul import weight_of
from .evaluate import Evaluation, resample

WINDOWS = 8  # scored of each document, spread evenly over those that have enough before them
WHOLE = "all"  # the horizon of a whole document, in rows


@dataclass
class Horizons:
    """Losses of the same windows by horizon.

    Attributes:
        losses: {h: (documents, WINDOWS or fewer, T) nats, one array a document}, and those of whole documents at WHOLE.
    """

    losses: dict[int | str, list[np.ndarray]]

    def rows(self) -> list[dict]:
        """For each horizon the mean nats a token, and by how much the whole document's state is better, with a 95%
        bootstrap interval over documents."""
        counts = np.array([each.size for each in self.losses[WHOLE]])
        sums = {h: np.array([each.sum() for each in documents]) for h, documents in self.losses.items()}
        draws = resample(len(counts))
        rows = []
        for horizon, each in sums.items():
            worse = each - sums[WHOLE]
            drawn = worse[draws].sum(axis=1) / counts[draws].sum(axis=1)
            interval = [float(q) for q in np.quantile(drawn, [0.025, 0.975])]
            nats, gap = float(each.sum() / counts.sum()), float(worse.sum() / counts.sum())
            rows.append({"horizon": horizon, "nats": nats, "behind_whole": gap, "behind_whole_interval": interval})
        return rows


def measure_horizons(
    model: RecurGPT2LMHeadModel,
    documents: Sequence[np.ndarray],
    whole: Evaluation,
    horizons: Sequence[int],
    *,
    lanes: int = 8,
    parallel_windows: int = 4,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Horizons:
    """Score some windows of each document once for each horizon.

    Args:
        documents: token ids (n,) each.
        whole: of the protocol "recurrent", on the same documents.
        horizons: windows that a state is built from.
        The other arguments are those of `evaluate`.

    Raises:
        InputError: no document is long enough for the longest horizon.
    """
    window, longest = model.config.window, max(horizons)
    chosen = [_spread(longest, (len(tokens) - 1) // window) for tokens in documents]
    places = [(n, number) for n, numbers in enumerate(chosen) for number in numbers]
    if not places:
        raise InputError(
            f"horizons={list(horizons)}: no document has more than {longest} full windows of {window} tokens; give "
            f"longer documents, or smaller horizons"
        )
    losses: dict[int | str, list[np.ndarray]] = {}
    steps = sum(-(-len(places) // lanes) for _ in horizons)
    with tqdm(total=steps, desc="horizons", disable=not progress, leave=False) as bar:
        for horizon in horizons:
            found = []
            for first in range(0, len(places), lanes):
                rows = [documents[n][(w - horizon) * window : (w + 1) * window + 1] for n, w in places[first:][:lanes]]
                found += list(_last_window(model, np.stack(rows), parallel_windows, dtype))
                bar.update()
            losses[horizon] = _by_document(found, chosen)
    whole_windows = [whole.losses[n][w * window : (w + 1) * window] for n, w in places]
    return Horizons(losses | {WHOLE: _by_document(whole_windows, chosen)})


def _spread(first, end):
    """Up to WINDOWS numbers from `first` to `end` - 1, evenly."""
    return np.unique(np.linspace(first, end - 1, WINDOWS).round().astype(int)).tolist() if end > first else []


def _by_document(found, chosen):
    """One array for each window -> one array for each document that has any."""
    found = iter(found)
    return [np.stack([next(found) for _ in numbers]) for numbers in chosen if numbers]


@torch.no_grad()
def _last_window(model, rows, parallel_windows, dtype):
    """(B, (h + 1) T + 1) token ids -> nats of the last window's targets (B, T), read on from an empty document."""
    window, device, was_training = model.config.window, model.device, model.training
    model.eval()
    tokens = torch.from_numpy(rows.astype(np.int64)).to(device)
    ids, targets = (part.unflatten(1, (-1, window)) for part in (tokens[:, :-1], tokens[:, 1:]))
    state = RecurState(torch.ones(len(rows), dtype=torch.int64), torch.zeros(len(rows), dtype=torch.int64))
    head = weight_of(model.lm_head)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        for block, wanted in zip(ids.split(parallel_windows, 1), targets.split(parallel_windows, 1), strict=True):
            starts = torch.zeros(block.shape[:2], dtype=torch.bool)
            hidden, shares, state = model.read_windows(block, wanted, starts, state)
        head = head if dtype is None else head.to(dtype)
        shares = None if shares is None else tuple(each[:, -1] for each in shares)
        nats = token_losses(hidden[:, -1].to(head.dtype), head, wanted[:, -1], shares)
    model.train(was_training)
    return nats.cpu().numpy()
