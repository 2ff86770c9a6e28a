"""From a pretrained GPT-2 to a model that reads on: load its weights, and show the new slots where they stand."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, GPT2LMHeadModel, PretrainedConfig

from .errors import InputError
from .fitting import fit_to_softmax
from .layers import is_feature_map

if TYPE_CHECKING:
    from .modeling import RecurGPT2Model

FIT_STEPS = 200  # of Adam, for each feature map
DISTIL_STEPS = 100  # of Adam, for all feature maps together
DISTIL_RATE = 1e-2  # where these begin
DISTIL_PLACES = 128  # whose logits exist at a time
LONGEST_FIT = 256  # tokens that feature maps are fitted on: the fit is quadratic in them
SAMPLES = 32  # stretches of tokens that the position shifts are averaged over
SAMPLED_TOKENS = 256  # of them read at a time: building a model must not take more memory than using it
FREQUENCY_CONTEXT = 2  # random tokens before the model is asked how frequent each token is


def load_config(name_or_path: str) -> PretrainedConfig:
    """The configuration of a model on the hub or in a folder.

    Raises:
        InputError: there is none.
    """
    if (Path(name_or_path) / "config.json").is_file():
        with refusing_damage(f"config.json of {name_or_path}"):
            return AutoConfig.from_pretrained(name_or_path)
    try:
        return AutoConfig.from_pretrained(name_or_path)
    except Exception as error:  # offline, unknown, private, no name at all: each library has its own
        raise InputError(
            f"no model was found at {str(name_or_path)!r}, neither as a folder nor on the hub; give a folder with "
            f"config.json and model.safetensors, a hub id such as openai-community/gpt2 (with a network), or the "
            f"bundled data/gpt2-mini"
        ) from error


def load_gpt2(name_or_path: str) -> GPT2LMHeadModel:
    """A GPT-2 from the hub or a folder, in float32 (checkpoints in 16 bit are widened).

    Raises:
        InputError: it cannot be found, is damaged, or is no GPT-2.
    """
    config = load_config(name_or_path)
    if config.model_type == "recur_gpt2":
        raise InputError(f"{name_or_path} already has windows; load it with from_pretrained instead of from_gpt2")
    if config.model_type != "gpt2":
        raise InputError(f"{name_or_path} is a {config.model_type} model; give a GPT-2 checkpoint")
    with refusing_damage(f"the weights of {name_or_path}"):
        base, found = GPT2LMHeadModel.from_pretrained(name_or_path, dtype=torch.float32, output_loading_info=True)
    refuse_missing(found, name_or_path, "GPT-2")
    return base


def refuse_missing(found: dict, name_or_path: str, what: str) -> None:
    """Refuse a model that lacks weights, by the loading info that `from_pretrained` returns: transformers only warns,
    and makes them up."""
    if found["missing_keys"]:
        lacking = sorted(found["missing_keys"])[:5]
        raise InputError(f"{name_or_path} does not hold a whole {what}; it lacks {lacking}; copy it again")


@contextmanager
def refusing_damage(what: str) -> Iterator[None]:
    """Turns whatever a library raises for a file that is missing, damaged or of another kind into an InputError.

    For a block in which a library reads `what`, and which does nothing else.
    """
    try:
        yield
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{what} are a pickle of more than tensors, which is not opened, since it could run any code; save the "
            f"model again as model.safetensors"
        ) from error
    except Exception as error:  # safetensors, zip, JSON and checks of fields: each has its own
        why = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{what} cannot be read ({why}); copy it again, whole") from error


@torch.no_grad()
def fit_slots(model: RecurGPT2Model) -> None:
    """Start the memory's slots where the model reads them well, or leaves them alone, before any training.

    Last positions and sinks are to look as if they stood right in front of the window. A last-position slot holds keys
    and values made at the end of a full window, and they say so: through the position embedding, and through how much
    context they saw. The remedy is measured on the model itself, without data: likely tokens are read as a full
    window, and the last of them once more at the positions in front of a window; the difference of the mean keys and
    values, layer by layer, is the slots' initial shift. A sink starts as the mean key and value of the first
    position, and a pooled slot as an average token in front of the window. docs/ablation.md has what this gains.

    Where the window takes so many positions that too few are left in front of it, the slots stand from the first ones
    on all the same, beside the window's own first tokens: a slot that says "the end" is one that the window's queries
    have never seen in front of them, and costs far more than one that shares its position.

    Embeddings that a net writes (with `pool_layers`) start around the mean input that their layers get at the first
    position, on which heads rest: around zero, the layer norm would blow the untrained net's output up to the size of a
    token that heads listen to.
    """
    config = model.config
    if config.pool_layers:
        _fit_embeddings(model)
    elif model.recurrence:
        _fit_keys_and_values(model)


@torch.no_grad()
def fit_feature_maps(model: RecurGPT2Model, tokens: Tensor | None = None) -> None:
    """Start the feature maps of linear layers where the model is nearest to itself with softmax, before any training.

    Measured on the model itself. First each map alone is fitted to the weights that its queries and keys have in
    softmax attention; then all maps together, and nothing else, learn to predict the next tokens that softmax attention
    predicts: what later layers make of an error shows there alone. docs/t2r.md compares this with other starts.

    Args:
        tokens: (samples, n) int64 to read, n at least a window; None for likely ones, which needs no data.
    """
    if not model.config.linear_layers:
        return
    _fit_one_by_one(model, tokens)
    _fit_together(model, tokens)


def _fit_one_by_one(model, tokens):
    layers, length = model.config.linear_layers, min(model.config.window, LONGEST_FIT)
    tokens = _likely_tokens(model, (SAMPLES, length)) if tokens is None else tokens[:, :length]
    reading = _read_plainly(model, tokens, torch.arange(length))
    with tqdm(total=len(layers), desc="fitting feature maps", unit="layer", leave=False) as bar:
        for block, (_, query, key, _) in zip(model.h, reading, strict=False):
            if block.feature_map is not None:
                with torch.enable_grad():
                    fit_to_softmax(
                        block.feature_map, query * block.query_factor, key, far_gate=block.far_gate, steps=FIT_STEPS
                    )
                bar.update()


def _fit_together(model, tokens):
    """Knowledge distillation (Hinton et al. 2015) from the model with softmax attention in all layers."""
    learning = [parameter for name, parameter in model.named_parameters() if is_feature_map(name)]
    if not learning:
        return
    window = model.config.window
    rows = max(1, LONGEST_FIT * 2 // window)
    tokens = _likely_tokens(model, (rows * DISTIL_STEPS, window)) if tokens is None else tokens[:, :window]
    starts = torch.ones(rows, 1, dtype=torch.bool)
    optimizer = torch.optim.Adam(learning, DISTIL_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, DISTIL_STEPS)
    for step in tqdm(range(DISTIL_STEPS), desc="fitting them together", unit="step", leave=False):
        read = tokens[(torch.arange(rows) + step * rows) % len(tokens)][:, None].to(model.wte.weight.device)
        wanted = model.read_softly(read, starts).flatten(0, -2)
        with torch.enable_grad():
            given = model.read(read, starts, run_layer=_recomputed)[0].flatten(0, -2)
            gradients = torch.autograd.grad(_divergence(given, wanted, model.wte.weight.detach()), learning)
        for parameter, gradient in zip(learning, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()


def _divergence(given, wanted, head):
    """Mean over N places of KL(wanted || given), of what two hidden states (N, D) predict. Logits of few places exist
    at a time, so that a conversion takes no more memory than training does."""

    def of_some(given, wanted):
        wanted = (wanted @ head.T).log_softmax(dim=-1)
        return (wanted.exp() * (wanted - (given @ head.T).log_softmax(dim=-1))).sum()

    parts = zip(given.split(DISTIL_PLACES), wanted.split(DISTIL_PLACES), strict=True)
    return sum(_recomputed(of_some, *part) for part in parts) / len(given)


def _recomputed(function, *inputs):
    """What the function gives; for the gradient it is called again."""
    return checkpoint(function, *inputs, use_reentrant=False)


def _fit_keys_and_values(model):
    config = model.config
    last, offset, end = config.last_slots, config.position_offset, config.position_offset + config.window
    tokens = _likely_tokens(model, (SAMPLES, end))
    at_end = _mean_keys_and_values(model, tokens, torch.arange(end))
    first = max(offset - last, min(config.sink_slots, 1))
    in_front = (first + torch.arange(last)).clamp_max(config.n_positions - 1)
    again = torch.cat((tokens[:, :1], tokens[:, end - last :]), dim=1)
    at_front = _mean_keys_and_values(model, again, torch.cat((torch.zeros(1, dtype=torch.int64), in_front)))
    for name, recurrence in model.recurrence.items():
        front, back = at_front[int(name)], at_end[int(name)]
        recurrence.sink[:] = front[..., :1, :]
        if last:
            recurrence.shift[..., config.pooled_slots :, :] = front[..., 1:, :] - back[..., end - last :, :]
            pooled = front[..., 1:, :].mean(dim=-2) - back[..., offset:, :].mean(dim=-2)
            recurrence.shift[..., : config.pooled_slots, :] = pooled[..., None, :]


def _fit_embeddings(model):
    config = model.config
    reading = _read_plainly(model, _likely_tokens(model, (SAMPLES, 1)), torch.zeros(1, dtype=torch.int64))
    inputs = [hidden.mean(dim=(0, 1)) for hidden, *_ in reading]
    first = torch.stack([inputs[layer] for layer in config.insert_layers]).mean(dim=0)
    model.recurrence["pooled"].net[-1].bias.copy_(first.repeat(config.pooled_slots))


def _likely_tokens(model, shape):
    """Independent tokens, each as frequent as the model expects it to be after random ones."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(model.config.vocab_size, (SAMPLES, FREQUENCY_CONTEXT), generator=generator)
    *_, (last, *_) = _read_plainly(model, random, torch.arange(FREQUENCY_CONTEXT))
    hidden = model.ln_f(last[:, -1])
    expected = (hidden @ model.wte.weight.T).softmax(dim=-1).mean(dim=0).cpu()
    return torch.multinomial(expected, shape[0] * shape[1], replacement=True, generator=generator).view(shape)


def _mean_keys_and_values(model, tokens, positions) -> list[Tensor]:
    """Each layer's mean keys and values (2, H, n, d) of plain GPT-2 over (samples, n) tokens at (n,) positions."""
    sums = [0.0] * len(model.h)
    for samples in tokens.split(max(1, SAMPLED_TOKENS // len(positions))):
        read = islice(_read_plainly(model, samples, positions), len(model.h))
        for layer, (_, _, key, value) in enumerate(read):
            sums[layer] = sums[layer] + torch.stack((key.sum(dim=0), value.sum(dim=0)))
    return [each / len(tokens) for each in sums]


def _read_plainly(model, tokens, positions) -> Iterator[tuple[Tensor, ...]]:
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
