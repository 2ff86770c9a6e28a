"""What a model costs: FLOPs counted from its configuration, memory and speed as measured.

A FLOP is a multiplication or an addition inside a matrix product, as torch's FlopCounterMode counts them: softmax
attention counts for the whole rectangle of queries and keys, whether a kernel skips the future or not.
"""

from __future__ import annotations

import gc
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from . import near_attention
from .allocator import release_memory
from .configuration import RecurGPT2Config
from .feature_maps import FEATURE_MAPS
from .linear_attention import CHUNK

try:
    import resource
except ImportError:  # Windows
    resource = None

STATUS = Path("/proc/self/status")
CLEAR_PEAK = "5"  # proc(5), clear_refs: reset the peak resident set size


def flops_per_token(config: RecurGPT2Config, *, memory: bool = True, training: bool = False) -> float:
    """FLOPs for one token of a full window, LM head included.

    Args:
        memory: whether the window reads memory; False for the first window of a document, or for windows read
            apart. What pooled slots cost to write is counted in any case: every window writes them.
        training: forward and backward (three times the forward, and what linear attention computes again) rather
            than forward alone. Recomputation under checkpointing would add one more forward.
    """
    forward = config.plain_flops
    for layer in range(config.n_layer):
        linear = layer in config.linear_layers
        if layer in config.insert_layers:
            reading = _reading_flops(config, linear=linear) if memory else 0
            forward += (_writing_flops(config) + reading) / config.window
        if linear:
            forward += _linear_flops(config) - 4 * config.n_embd * config.window
    return 3 * forward + len(config.linear_layers) * _recomputed_flops(config) if training else forward


def _linear_flops(config):
    """FLOPs of linear attention for one token: features, products inside a chunk, and sums from chunk to chunk."""
    if config.near_tokens:
        return _near_flops(config)
    head, features, matrix = head_features(config)
    chunk = min(CHUNK, config.window)
    carrying = 2 * features * head if config.carry_linear_state else 0  # of windows computed together
    each = 4 * head * matrix + 2 * chunk * (features + head) + 4 * features * head + carrying
    return config.n_head * each


def _near_flops(config):
    """The same of layers with `near_tokens`, where a chunk's queries meet w places in front of it and its own."""
    head, features, matrix = head_features(config)
    near, window = config.near_tokens, config.window
    chunk = min(near_attention.CHUNK, near, window)
    chunked = -(-window // chunk) * chunk / window  # of the last chunk's queries, some are padding
    in_chunk = 4 * (near + chunk) * head + 2 * chunk * features + 4 * features * head + 2 * features
    carrying = (1 + near / window) * 2 * head * (matrix + features) if config.carry_linear_state else 0
    return config.n_head * (4 * head * matrix + 2 * head + chunked * in_chunk + carrying)


def _recomputed_flops(config):
    """FLOPs for one token of what linear attention's backward pass makes once more: the products inside a chunk."""
    if config.near_tokens:
        return 0
    return 2 * config.n_head * min(CHUNK, config.window) * head_features(config)[1]


def head_features(config: RecurGPT2Config) -> tuple[int, int, int]:
    """d, k and rows of a head's feature matrix."""
    head = config.n_embd // config.n_head
    return head, *FEATURE_MAPS[config.feature_map].sizes(head, config.feature_size)


def _reading_flops(config, *, linear):
    """FLOPs of one window in one insertion layer for the memory that it reads."""
    width, window, slots = config.n_embd, config.window, config.memory_slots
    attending = 4 * width * window * slots
    if linear:
        _, features, matrix = head_features(config)
        attending = 2 * width * max(0, slots - config.near_tokens) * (matrix + features)
    if not config.pool_layers:
        return attending
    hidden = config.recurrence_width
    net = 2 * (width * hidden + hidden * hidden + hidden * slots * width)  # run by every insertion layer
    return attending + net + 2 * width * 2 * width * slots


def _writing_flops(config):
    """FLOPs of one window in one insertion layer for the memory that it leaves. A mean or a slice costs none."""
    return 0 if config.pool_layers else config.pooled_slots * config.n_embd * (6 * config.window + 2)


@dataclass
class Measurement:
    """What `Meter` measured.

    Attributes:
        seconds: wall-clock time.
        peak_memory_bytes: weights and the most that was in use beside them; None where it cannot be measured.
    """

    seconds: float = 0.0
    peak_memory_bytes: int | None = None


class Meter:
    """Context manager that measures time and peak memory of what runs inside it.

    On CUDA the peak is PyTorch's own count of allocated bytes. On the CPU (Linux) it is the growth of the process's
    resident memory above its start, plus the model's weights, which are resident already.
    """

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.device = next(model.parameters()).device
        self.result = Measurement()

    def __enter__(self) -> Measurement:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            release_memory()
            self._resident = reset_peak()
        self._start = time.perf_counter()
        return self.result

    def __exit__(self, *exception):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.result.peak_memory_bytes = torch.cuda.max_memory_allocated(self.device)
        elif self._resident is not None:
            self.result.peak_memory_bytes = peak_resident() - self._resident + weight_bytes(self.model)
        self.result.seconds = time.perf_counter() - self._start


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of the parameters, shared ones counted once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def peak_resident() -> int:
    """Most bytes this process has had in memory, since its start or the last `Meter`."""
    if STATUS.exists():
        return process_bytes("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak() -> int | None:
    """Resident bytes now, with the peak set back to them; None where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text(CLEAR_PEAK)
        return process_bytes("VmRSS")
    except OSError:
        return None


def process_bytes(field: str) -> int:
    """What Linux says of this process's memory, by its name in /proc/self/status: VmRSS, VmHWM, VmData."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024
