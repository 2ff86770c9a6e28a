"""T2R (Kasai et al. 2021): swap the softmax attention of a model at hand for linear attention, in any layers."""

from __future__ import annotations

from ..errors import InputError
from .arguments import LinearAttentionOptions
from .configuration import RecurGPT2Config
from .feature_map_fitting import fit_feature_maps
from .pretrained import RecurGPT2PreTrainedModel


def convert_to_t2r(
    model: RecurGPT2PreTrainedModel,
    layers: str | list[int] = "all",
    feature_map: str = LinearAttentionOptions.feature_map,
    feature_size: int = LinearAttentionOptions.feature_size,
    *,
    near_tokens: int = LinearAttentionOptions.near_tokens,
    carry_linear_state: bool = LinearAttentionOptions.carry_linear_state,
) -> RecurGPT2PreTrainedModel:
    """Give layers of a model linear attention, in place; all other weights stay as they are.

    The new feature maps start near softmax (`feature_map_fitting.fit_feature_maps`); finetuning is to follow.

    Args:
        model: with softmax attention in all layers.
        layers: "all", "75%" (every fourth layer, counted from the top, keeps softmax) or a list of layers.
        feature_map: "t2r", "hedgehog", "elu" or "rfa".
        feature_size: k, features of a head.
        near_tokens: w, nearest positions that the layers attend to by softmax all the same.
        carry_linear_state: carry the sums (S, z) over the border of two windows.

    Returns:
        The model itself, in evaluation mode.

    Raises:
        InputError: the model was converted before, there is no such layer or map, or the options contradict its
            recurrence. The model is then as it was.
    """
    config = model.config
    if config.linear_layers:
        raise InputError(
            f"layers {config.linear_layers} have linear attention already; convert the model that they were made from"
        )
    options = {"linear_layers": layers, "feature_map": feature_map, "feature_size": feature_size}
    options |= {"near_tokens": near_tokens, "carry_linear_state": carry_linear_state}
    converted = RecurGPT2Config(**config.to_dict() | options)
    if not converted.linear_layers:
        raise InputError(f'layers={layers} names no layer to convert; give some, "75%" or "all"')
    core = getattr(model, "transformer", model)
    made = {layer: core.h[layer].new_feature_map(converted) for layer in converted.linear_layers}
    for name in options:
        setattr(config, name, getattr(converted, name))
    for layer, new in made.items():
        core.h[layer].make_linear(new, config)
    fit_feature_maps(core.eval())
    return model.eval()
