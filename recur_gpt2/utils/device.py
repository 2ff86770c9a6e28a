"""Where to compute: the one place that knows."""

import torch

from ..errors import InputError


def checked_device(device: str | torch.device | None) -> str:
    """A device by name: "auto" or None is a GPU if there is one.

    Raises:
        InputError: it is no device, or a GPU that is not there.
    """
    if device is None or device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device={str(device)!r} is not known; use auto, cpu or cuda") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device={str(device)!r} was asked for, but PyTorch sees no such GPU; use --device cpu")
    return str(device)
