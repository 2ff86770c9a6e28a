"""`recur-gpt2 convert`: give layers of a model linear attention (T2R)."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from ..data.bundle import BUNDLED_MODEL
from ..errors import InputError
from ..models.arguments import LinearAttentionOptions
from ..utils.files import check_can_write
from .flags import add_flags, settings_of

LAYERS = ["all"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default=str(BUNDLED_MODEL), help="GPT-2 or recur_gpt2 model: hub id or folder")
    add("--output", type=Path, required=True, help="folder to write the converted model to")
    add("--window", type=int, help="T; default: the model's own, or 256 for a GPT-2")
    add("--recurrence", default="none", help="for a GPT-2: give it this recurrence too (default: none)")
    add_linear_arguments(parser, "--layers")


def add_linear_arguments(parser: argparse.ArgumentParser, layers: str) -> None:
    """The flags of linear attention; `layers` is what the flag that names the layers is called."""
    parser.add_argument(layers, nargs="+", default=LAYERS, help="all, 75%% or numbers of layers (default: all)")
    add_flags(parser, LinearAttentionOptions)


def layer_names(words: list[str]) -> str | list[int]:
    """What --t2r-layers and --layers say: the name of a set of layers, or their numbers."""
    try:
        return [int(word) for word in words]
    except ValueError:
        return " ".join(words)


def run(args: argparse.Namespace) -> None:
    """Convert a model and save it."""
    from ..models.block import is_feature_map
    from ..models.conversion import convert_to_t2r
    from ..models.hub import load_tokenizer
    from ..models.loading import load_any, save_model

    if args.output.exists():
        raise InputError(f"{args.output} exists already; give another --output")
    check_can_write(args.output, folder=True)
    tokenizer = load_tokenizer(args.model)
    model = load_any(args.model, args.window, args.recurrence)
    options = asdict(settings_of(LinearAttentionOptions, args))
    convert_to_t2r(model, layer_names(args.layers), **options)
    save_model(model, tokenizer, args.output)
    print(f"layers {model.config.linear_layers} have linear attention now; finetune it:")
    transfer = " --transfer-steps 60" if any(is_feature_map(name) for name, _ in model.named_parameters()) else ""
    print(f"recur-gpt2 finetune --model {args.output} --window {model.config.window}{transfer}")
