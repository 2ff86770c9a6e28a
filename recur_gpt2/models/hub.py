"""Configurations, GPT-2 checkpoints and tokenizers, from a folder or the Hugging Face Hub."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, GPT2LMHeadModel, PretrainedConfig, PreTrainedTokenizerBase

from ..errors import InputError

NO_LIMIT = int(1e30)  # as transformers says that a tokenizer has none


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


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write a tokenizer's files, for texts of any length."""
    tokenizer = copy(tokenizer)
    tokenizer.model_max_length = NO_LIMIT
    tokenizer.save_pretrained(folder)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer that lies with a model.

    Raises:
        InputError: there is none, it is damaged, or it has more entries than the model has rows of embeddings.
    """
    if (Path(name_or_path) / "tokenizer.json").is_file():
        config = load_config(name_or_path)  # which tokenizers are read by, too: what is wrong there is said of it
        with refusing_damage(f"the tokenizer of {name_or_path}"):
            tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        rows = getattr(config, "vocab_size", len(tokenizer))
        if len(tokenizer) > rows:
            raise InputError(
                f"the tokenizer of {name_or_path} has {len(tokenizer)} entries and the model {rows} rows of vectors; "
                f"give the tokenizer that it was trained with, or a model that was resized (resize_token_embeddings)"
            )
        return tokenizer
    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except Exception as error:  # offline, unknown, no name at all: each library has its own
        raise InputError(
            f"no tokenizer was found at {str(name_or_path)!r}; give a folder that holds tokenizer.json too, a "
            f"hub id (with a network), or the bundled data/gpt2-mini"
        ) from error
