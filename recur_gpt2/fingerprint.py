"""A short name for a model's weights and configuration, so that a saved state is not read on by another model."""

import hashlib
import json

import torch
from torch import nn

SAMPLES = 16  # numbers of each parameter: finetuning changes nearly all of them


def model_fingerprint(model: nn.Module) -> str:
    """Of a RecurGPT2Model: the same wherever it is and in whatever number type, another one after any finetuning.

    What `train()`, devices and folded feature maps change does not count.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key in SHAPING}
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=16)
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        places = torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat)), dtype=torch.float64).long()
        # In 16 bit, as a model that was cast to it has them.
        sample = flat[places.to(flat.device)].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


SHAPING = {
    *("n_layer", "n_head", "n_embd", "n_positions", "vocab_size", "window", "position_offset", "insert_layers"),
    *("pool_layers", "sink_slots", "last_slots", "pooled_slots", "linear_layers", "feature_map", "near_tokens"),
    "carry_linear_state",
}
