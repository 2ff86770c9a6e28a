"""Time and peak memory of what runs in this process, as measured."""

from __future__ import annotations

import gc
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from .allocator import release_memory

try:
    import resource
except ImportError:  # Windows
    resource = None

STATUS = Path("/proc/self/status")
CLEAR_PEAK = "5"  # proc(5), clear_refs: reset the peak resident set size


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
