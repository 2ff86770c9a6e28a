"""A name for a model's weights and configuration, so that a saved state is not read on by another model.

It holds a digest of the configuration and of all shapes, the type of the weights, and a few numbers of each parameter,
so that a copy of the model in another type is known for what it is, though it rounds.
"""

from __future__ import annotations

import base64
import hashlib
import json
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .configuration import OWN_FIELDS
from .memory import LayerMemory

SAMPLES = 16  # numbers of each parameter: finetuning changes nearly all of them
FLOAT16_STEP = 2.0**-24  # between two of its smallest numbers, whose rounding is no part of what they are
_known: WeakKeyDictionary[nn.Module, tuple[tuple, str]] = WeakKeyDictionary()


def model_fingerprint(model: nn.Module) -> str:
    """Of a RecurGPT2Model: the same wherever it is, another one after any finetuning.

    What `train()`, devices and folded feature maps change does not count.
    """
    try:
        version = tuple((parameter.data_ptr(), parameter._version) for parameter in model.parameters())
    except RuntimeError:  # made in inference mode: changes are not counted
        return _made(model)
    if _known.get(model, (None,))[0] != version:
        _known[model] = version, _made(model)
    return _known[model][1]


def is_of(fingerprint: str, model: nn.Module) -> bool:
    """Whether the fingerprint is this model's, or a copy's of it in another floating-point type.

    Copies in two types agree to one step of the coarser one, which rounding twice may cost. A name of the first
    release, a digest of rounded numbers, says nothing here.
    """
    own = model_fingerprint(model)
    if fingerprint == own or fingerprint.count(":") != own.count(":"):
        return True
    (shape, kind, samples), (own_shape, own_kind, own_samples) = map(_parsed, (fingerprint, own))
    if shape != own_shape or kind == own_kind or len(samples) != len(own_samples):
        return False
    coarser = max(kind, own_kind, key=lambda each: torch.finfo(each).eps)
    first, second = (each.to(coarser).double() for each in (samples, own_samples))
    least = FLOAT16_STEP if torch.float16 in (kind, own_kind) else 0.0
    return torch.allclose(first, second, rtol=torch.finfo(coarser).eps, atol=least)


def _made(model):
    config = {key: value for key, value in model.config.to_dict().items() if key in SHAPING}
    if not config["pointer_slots"]:  # as before there were any
        del config["pointer_slots"], config["pointer_width"]
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=16)
    samples, kind = [], torch.float64
    for name, shape, parameter in _parameters(model):
        digest.update(f"{name} {shape}".encode())
        if parameter is None or not parameter.is_floating_point():  # quantised: its name and shape must do
            continue
        kind = max(kind, parameter.dtype, key=lambda each: torch.finfo(each).eps)
        flat = parameter.detach().flatten()
        places = torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat)), dtype=torch.float64).long()
        samples.append(flat[places.to(flat.device)].to("cpu", torch.float64))
    numbers = torch.cat(samples)
    numbers = numbers if kind == torch.float64 else numbers.float()
    text = base64.b64encode(numbers.numpy().tobytes()).decode()
    return f"{digest.hexdigest()}:{str(kind).removeprefix('torch.')}:{text}"


def _parameters(model):
    """(name, shape, parameter) of all, and None for those of slots that a memory has none of, which it once had."""
    for prefix, module in model.named_modules():
        shapes = module.shapes if isinstance(module, LayerMemory) else {}
        own = {name: tuple(each.shape) for name, each in module.named_parameters(recurse=False)}
        for name, shape in (shapes | own).items():
            yield f"{prefix}.{name}".lstrip("."), shape, module._parameters[name]


def _parsed(fingerprint) -> tuple[str, torch.dtype, Tensor]:
    shape, kind, text = fingerprint.split(":")
    kind = getattr(torch, kind)
    stored = torch.float64 if kind == torch.float64 else torch.float32
    return shape, kind, torch.frombuffer(bytearray(base64.b64decode(text)), dtype=stored).double()


# What says how a model computes and no shape does.
SHAPING = {"n_layer", "n_head", "n_embd", "n_positions", "vocab_size", *OWN_FIELDS}
SHAPING -= {"recurrence", "recurrence_width", "feature_size"}
