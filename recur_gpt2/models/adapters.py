"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685) by PEFT: a few numbers learned beside weights that stay.

An adapter's folder holds PEFT's own files and the configuration of the model that it was made on, so that the model
can be made again from the base that the adapter names.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from .configuration import OWN_FIELDS
from .hub import load_config, refusing_damage
from .modeling import RecurGPT2LMHeadModel

try:
    import peft
except ImportError:  # an extra
    peft = None

CONFIG = "adapter_config.json"
TARGETS = ["c_attn", "c_proj", "c_fc"]  # all projections of a layer
LEARNED_WHOLE = ("recurrence", "feature_map", "far_gate")  # what GPT-2 has not


def add_lora(model: RecurGPT2LMHeadModel, rank: int, base: str) -> peft.PeftModel:
    """Give all projections adapters, in place; they and what is new in the model learn, all else is frozen.

    Args:
        rank: r of each adapter.
        base: where the model came from: a folder or a hub id, which the adapter will name.

    Returns:
        PEFT's view of the model, to save the adapter from.

    Raises:
        InputError: PEFT is not installed, or the model carries sums of linear attention.
    """
    _check_peft()
    if model.config.carry_linear_state:
        raise InputError("carry_linear_state=True has decays that no adapter learns; leave it or lora_rank out")
    names = {part for name, _ in model.named_parameters() for part in name.split(".")}
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=TARGETS,
        fan_in_fan_out=True,  # GPT-2's weights lie input by input
        modules_to_save=[name for name in LEARNED_WHOLE if name in names] or None,
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(model, config)
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else str(base)
    return adapted


def save_adapter(adapted: peft.PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write an adapter with the model's configuration and tokenizer, a few megabytes."""
    adapted.save_pretrained(folder, save_embedding_layers=False)
    adapted.get_base_model().config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def is_adapter(name_or_path: str) -> bool:
    return (Path(name_or_path) / CONFIG).is_file()


def load_adapted(folder: str, window: int | None, recurrence: str, **options) -> RecurGPT2LMHeadModel:
    """The model that an adapter names, with the adapter merged into its weights, in float32.

    Args:
        window, recurrence, options: of a base that is a GPT-2, where the folder has no configuration of ours.

    Raises:
        InputError: PEFT is not installed; the base is not there; the adapter is damaged or another model's.
    """
    _check_peft()
    with refusing_damage(f"{CONFIG} of {folder}"):
        base = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    if (Path(folder) / "config.json").is_file():
        options = {name: getattr(load_config(folder), name) for name in OWN_FIELDS}
        window, recurrence = options.pop("window"), options.pop("recurrence")
    try:
        if load_config(base).model_type == "recur_gpt2":
            model = RecurGPT2LMHeadModel.from_pretrained(base, dtype="float32")
        else:
            model = RecurGPT2LMHeadModel.from_gpt2(base, window=window or 256, recurrence=recurrence, **options)
        with refusing_damage("its weights"):
            return peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
    except InputError as error:
        raise InputError(f"the adapter in {folder} does not fit the base that it names, {base}: {error}") from error


def _check_peft():
    if peft is None:
        raise InputError("adapters need PEFT; install it: pip install 'recur-gpt2[peft]'")
