"""AdamW and its learning rates, phase by phase."""

from __future__ import annotations

import torch

from ..models.block import is_new
from ..models.modeling import RecurGPT2LMHeadModel
from .arguments import TrainingArguments

# Adapters learn best at about ten times the rate of the weights themselves, whatever the model (Schulman et al. 2025,
# "LoRA without regret").
ADAPTER_RATE = 10


def make_optimizer(model: RecurGPT2LMHeadModel, args: TrainingArguments) -> torch.optim.AdamW:
    """AdamW; what is new (recurrence, feature maps) and adapters learn at rates of their own. Only pretrained matrices
    decay."""
    groups = {"decayed": [], "plain": [], "new": [], "adapter": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[_kind(name, parameter)].append(parameter)
    rates = {"decayed": args.lr, "plain": args.lr, "new": args.recurrence_lr, "adapter": ADAPTER_RATE * args.lr}
    return torch.optim.AdamW(
        [
            {
                "params": groups[kind],
                "lr": rate,
                "peak": rate,
                "new": kind == "new",
                "weight_decay": args.weight_decay * (kind == "decayed"),
            }
            for kind, rate in rates.items()
            if groups[kind]
        ],
        betas=(0.9, 0.95),
        fused=True,
    )


def _kind(name, parameter):
    if is_new(name):
        return "new"
    if ".lora_" in name:
        return "adapter"
    return "decayed" if parameter.ndim >= 2 else "plain"


def set_rates(optimizer: torch.optim.Optimizer, args: TrainingArguments, step: int) -> None:
    """Linear warm-up, then linear decay to zero, in attention transfer and in finetuning; a function of the step alone.

    Pretrained parameters that wait for new ones begin with a warm-up of their own.
    """
    transfers, first = step < args.transfer_steps, args.transfer_steps
    for group in optimizer.param_groups:
        begins = first + (0 if group["new"] else args.new_first_steps)
        begins, ends = (0, first) if transfers else (begins, args.all_steps)
        warmup = max(1, round(args.warmup * (ends - begins)))
        factor = min((step + 1 - begins) / warmup, (ends - step) / max(1, ends - begins - warmup))
        group["lr"] = (args.transfer_lr if transfers else group["peak"]) * max(0.0, factor)
