"""What a pretrained GPT-2 does with likely tokens: measured on the model itself, without data.

New parts of a model start from it: slots of memory, feature maps.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

SAMPLES = 32  # sequences of tokens that the position shifts are averaged over
FREQUENCY_CONTEXT = 2  # random tokens before the model is asked how frequent each token is


def likely_tokens(model: nn.Module, shape: tuple[int, int]) -> Tensor:
    """Independent tokens, each as frequent as the model expects it to be after random ones."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(model.config.vocab_size, (SAMPLES, FREQUENCY_CONTEXT), generator=generator)
    *_, (last, *_) = read_plainly(model, random, torch.arange(FREQUENCY_CONTEXT))
    hidden = model.ln_f(last[:, -1])
    expected = (hidden @ model.wte.weight.T).softmax(dim=-1).mean(dim=0).cpu()
    return torch.multinomial(expected, shape[0] * shape[1], replacement=True, generator=generator).view(shape)


def read_plainly(model: nn.Module, tokens: Tensor, positions: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """(samples, n) tokens at (n,) positions through plain GPT-2, with softmax attention in all layers.

    Yields:
        For each layer its input (samples, n, D) and its queries, keys and values (samples, H, n, d); then the output
        of the last layer, alone.
    """
    device = model.wte.weight.device
    hidden = model.wte(tokens.to(device)) + model.wpe(positions.to(device))
    for block in model.h:
        query, key, value = block.project(hidden)
        yield hidden, query, key, value
        attended = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=block.attn.scaling
        )
        hidden = block.finish(hidden, attended)
    yield (hidden,)
