"""Which number type to compute in, decided by measuring: processors differ, and their names do not tell."""

import time

import torch

from ..errors import InputError
from ..models.modeling import RecurGPT2LMHeadModel
from ..ops.cross_entropy import summed_loss
from ..ops.matmul import weight_of

TRIALS = 2
TRIAL_ROWS = 4


def autocast_dtype(model: RecurGPT2LMHeadModel, precision: str, *, training: bool) -> torch.dtype | None:
    """The type to autocast to, or None for float32.

    Args:
        precision: "float32", "bfloat16", or "auto" for the one in which a few windows of this model take less time on
            its device.
        training: forward and backward are timed, rather than the forward pass alone.
    """
    if precision == "auto":
        return min((None, torch.bfloat16), key=lambda dtype: _seconds(model, dtype, training))
    if precision not in ("float32", "bfloat16"):
        raise InputError(f"precision={precision!r} is not known; use auto, float32 or bfloat16")
    return torch.bfloat16 if precision == "bfloat16" else None


def _seconds(model, dtype, training):
    """Least time of a pass, after one to warm up. Leaves neither gradients nor used randomness."""
    device = next(model.parameters()).device
    ids = torch.zeros(TRIAL_ROWS, 1, model.config.window, dtype=torch.int64, device=device)
    starts = torch.ones(TRIAL_ROWS, 1, dtype=torch.bool)
    times = []
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.set_grad_enabled(training):
        for _ in range(1 + TRIALS):
            began = time.perf_counter()
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                hidden, shares, _ = model.read_windows(ids, ids, starts)
                loss = summed_loss(hidden, weight_of(model.lm_head), ids, shares)
            if training:
                loss.backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - began)
    if training:
        model.zero_grad(set_to_none=True)
    return min(times[1:])
