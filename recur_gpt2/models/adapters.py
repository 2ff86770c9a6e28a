"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685) by PEFT: a few numbers learned beside weights that stay.

An adapter's folder holds PEFT's own files and the configuration of the model that it was made on, so that the model
can be made again from the base that the adapter names.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from .block import NEW_PARTS
from .configuration import OWN_FIELDS
from .hub import load_config, refusing_damage, save_tokenizer

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG = "adapter_config.json"
TARGETS = ["c_attn", "c_proj", "c_fc"]  # all projections of a layer


def add_lora(model: nn.Module, rank: int, base: str) -> PeftModel:
    """Give all projections adapters, in place; they and what is new in the model learn, all else is frozen.

    Args:
        model: a RecurGPT2LMHeadModel.
        rank: r of each adapter.
        base: where the model came from: a folder or a hub id, which the adapter will name.

    Returns:
        PEFT's view of the model, to save the adapter from.

    Raises:
        InputError: PEFT is not installed, or the model carries sums of linear attention.
    """
    peft = _peft()
    if model.config.carry_linear_state:
        raise InputError("carry_linear_state=True has decays that no adapter learns; leave it or lora_rank out")
    names = {part for name, _ in model.named_parameters() for part in name.split(".")}
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=TARGETS,
        fan_in_fan_out=True,  # GPT-2's weights lie input by input
        modules_to_save=sorted(NEW_PARTS & names) or None,
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(model, config)
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else str(base)
    return adapted


def save_adapter(adapted: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write an adapter with the model's configuration and tokenizer, a few megabytes."""
    adapted.save_pretrained(folder, save_embedding_layers=False)
    adapted.get_base_model().config.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def is_adapter(name_or_path: str) -> bool:
    return (Path(name_or_path) / CONFIG).is_file()


def adapter_base(folder: str) -> tuple[str, dict]:
    """What an adapter was made on: where the base is, and how it is to be loaded, if the folder says so.

    Returns:
        A folder or hub id, and fields of RecurGPT2Config; none where the folder has no configuration of ours.

    Raises:
        InputError: a file is damaged.
    """
    with refusing_damage(f"{CONFIG} of {folder}"):
        base = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    if not (Path(folder) / "config.json").is_file():
        return base, {}
    config = load_config(folder)
    return base, {name: getattr(config, name) for name in OWN_FIELDS}


def merge_adapter(model: nn.Module, folder: str) -> nn.Module:
    """The model with an adapter merged into its weights.

    Raises:
        InputError: PEFT is not installed; the adapter is damaged, or another model's.
    """
    peft = _peft()
    with refusing_damage(f"the adapter in {folder}"):
        return peft.PeftModel.from_pretrained(model, folder).merge_and_unload()


def _peft():
    """Imported by those who need it: it takes half a second, of every command."""
    try:
        return import_module("peft")
    except ImportError:
        raise InputError("adapters need PEFT; install it: pip install 'recur-gpt2[peft]'") from None
