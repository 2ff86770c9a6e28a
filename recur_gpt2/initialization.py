"""From a pretrained GPT-2 to a model that reads on: load its weights, and teach the new slots where they stand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, GPT2LMHeadModel

from .errors import InputError

if TYPE_CHECKING:
    from .modeling import RecurGPT2Model

SAMPLES = 64  # random stretches that the position shifts are averaged over


def load_gpt2(name_or_path: str) -> GPT2LMHeadModel:
    """A GPT-2 from the hub or a folder, in float32 (checkpoints in 16 bit are widened).

    Raises:
        InputError: it cannot be found, is damaged, or is no GPT-2.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError, HFValidationError) as error:
        raise InputError(
            f"no model was found at {str(name_or_path)!r}, neither as a folder nor on the hub; give a folder with "
            f"config.json and model.safetensors, a hub id such as openai-community/gpt2 (with a network), or the "
            f"bundled data/gpt2-mini"
        ) from error
    if config.model_type == "recur_gpt2":
        raise InputError(f"{name_or_path} already has windows; load it with from_pretrained instead of from_gpt2")
    if config.model_type != "gpt2":
        raise InputError(f"{name_or_path} is a {config.model_type} model; give a GPT-2 checkpoint")
    try:
        return GPT2LMHeadModel.from_pretrained(name_or_path, dtype=torch.float32)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise InputError(
            f"the weights of {name_or_path} cannot be read ({error}); copy the checkpoint again"
        ) from error


@torch.no_grad()
def imitate_positions(model: RecurGPT2Model) -> None:
    """Let sinks and last positions look to GPT-2 as if they stood in front of the window.

    A last-position slot holds keys and values made at the end of its window. GPT-2 adds its position embedding to
    the input, so those keys say "the end". What a position contributes is measured on the model itself: random
    tokens read at the end of a window and, once more, where the slots should seem to be; the mean difference at each
    layer is the slot's initial shift. A sink starts as the mean key and value of the first position.
    """
    config = model.config
    if not config.position_offset or not model.recurrence or config.pool_layers:
        return
    last, sinks = config.last_slots, config.sink_slots
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (SAMPLES, 1 + last), generator=generator)
    end = config.position_offset + config.window - last
    front = config.position_offset - last
    positions = torch.arange(last)
    zero = torch.zeros(1, dtype=torch.int64)
    at_front = _mean_keys_and_values(model, tokens, torch.cat((zero, (front + positions).clamp_min(0))))
    at_end = _mean_keys_and_values(model, tokens, torch.cat((zero, end + positions)))
    for name, recurrence in model.recurrence.items():
        shift = (at_front[int(name)] - at_end[int(name)])[..., 1:, :]
        recurrence.shift[..., config.pooled_slots :, :] = shift
        recurrence.sink[:] = at_front[int(name)][..., :1, :].expand(-1, -1, sinks, -1)


def _mean_keys_and_values(model, tokens, positions) -> list[Tensor]:
    """Each layer's mean keys and values (2, H, n, d) of plain GPT-2 over (samples, n) tokens at (n,) positions."""
    device = model.wte.weight.device
    hidden = model.wte(tokens.to(device)) + model.wpe(positions.to(device))
    means = []
    for block in model.h:
        query, key, value = block.project(hidden)
        means.append(torch.stack((key.mean(dim=0), value.mean(dim=0))))
        attended = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=block.attn.scaling
        )
        hidden = block.finish(hidden, attended)
    return means
