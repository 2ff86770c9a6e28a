"""Models and tokenizers by name, as commands take them; saving both."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from ..utils.files import whole_folder
from .adapters import adapter_base, is_adapter, merge_adapter, save_adapter
from .block import is_new
from .configuration import OWN_FIELDS, RecurGPT2Config
from .hub import load_config, refuse_missing, refusing_damage
from .modeling import RecurGPT2LMHeadModel


def load_any(name_or_path: str, window: int | None = None, recurrence: str = "none", **options) -> RecurGPT2LMHeadModel:
    """One of our models as it is, or a GPT-2 given a window (256 unless said otherwise), a recurrence and `options`; or
    the one that an adapter was made on, with it."""
    if is_adapter(name_or_path):
        return _load_adapted(name_or_path, window, recurrence, **options)
    config = load_config(name_or_path)
    if config.model_type != RecurGPT2Config.model_type:
        made = RecurGPT2LMHeadModel.from_gpt2(name_or_path, window=window or 256, recurrence=recurrence, **options)
        return _read(made)
    _check_window(name_or_path, config, window)
    with refusing_damage(f"the weights of {name_or_path}"):
        model, found = RecurGPT2LMHeadModel.from_pretrained(name_or_path, dtype=torch.float32, output_loading_info=True)
    refuse_missing(found, name_or_path, "model of recur_gpt2")
    return _read(model.eval())


def _load_adapted(folder, window, recurrence, **options):
    """The base that an adapter names, with the adapter merged into it."""
    base, made_with = adapter_base(folder)
    try:
        model = load_any(base, **({"window": window, "recurrence": recurrence} | options | made_with))
        merged = merge_adapter(model, folder)
    except InputError as error:
        raise InputError(f"the adapter in {folder} does not fit the base that it names, {base}: {error}") from error
    _check_window(folder, merged.config, window)
    return _read(merged.eval())


def _check_window(name_or_path, config, window):
    if window not in (None, config.window):
        raise InputError(
            f"{name_or_path} was made for window={config.window}, not {window}; give --window {config.window}"
        )


def _read(model):
    """The model, with its weights in memory: transformers maps their file, which is read where it is first used, and a
    measurement of that use would count them as its own."""
    for parameter in model.parameters():
        parameter.detach().sum()
    return model


def plain_copy(model: RecurGPT2LMHeadModel) -> RecurGPT2LMHeadModel:
    """The GPT-2 inside: its weights and window, softmax attention, nothing carried.

    A shallow copy, so that no second set of weights is ever held: the two models share those that both have.
    """
    fields = {key: value for key, value in model.config.to_dict().items() if key not in OWN_FIELDS}
    fields |= {"window": model.config.window, "recurrence": "none"}
    with torch.device("meta"):
        plain = RecurGPT2LMHeadModel(RecurGPT2Config(**fields))
    weights = {name: tensor for name, tensor in model.state_dict().items() if not is_new(name)}
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    return plain.eval()


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a model, or the adapter alone where it has one, and its tokenizer, whole or not at all."""
    try:
        with whole_folder(folder) as unfinished:
            if isinstance(model, RecurGPT2LMHeadModel):
                model.save_pretrained(unfinished, tokenizer=tokenizer)
            else:
                save_adapter(model, tokenizer, unfinished)
    except (OSError, SafetensorError) as error:
        raise InputError(f"the model could not be written to {folder} ({error}); make room, then --resume") from error
