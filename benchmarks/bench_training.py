"""Training speed and memory beside transformers' own GPT-2, on the same windows with the same optimizer.

    python benchmarks/bench_training.py                                             # data/gpt2-mini
    python benchmarks/bench_training.py --model gpt2 --checkpointing-sweep          # GPT-2 small's shape

A step is forward, loss, backward and AdamW over `--lanes` times `--bptt` windows. transformers reads the windows as the
rows of one batch, T tokens in and T scored, without a key-value cache; its loss is that of its forward with labels.
Weights are in float32, with autocast if `--precision bfloat16`.
"""

from __future__ import annotations

import argparse
import sys
import time
from argparse import Namespace

import torch
from common import (
    PEER,
    add_arguments,
    build_ours,
    build_transformers,
    check_arguments,
    compiled,
    interleave,
    number,
    peak_memory,
    print_table,
    ratio,
    resident,
    run,
    summarise,
    synchronize,
)

from recur_gpt2.utils.measure import Meter, weight_bytes

PEER_CHECKPOINTING = f"{PEER}_checkpointing"
VARIANTS = {  # name -> recurrence, and what differs from TrainingArguments' defaults
    PEER: (None, {}),
    PEER_CHECKPOINTING: (None, {"checkpointing": True}),
    "disjoint": ("default", {"recurrent": False}),
    "default": ("default", {}),
    "default_p1": ("default", {"parallel_windows": 1}),
    "yoshida2020": ("yoshida2020", {}),
    "checkpointing": ("default", {"checkpointing": True}),
    "lora": ("default", {"lora_rank": 8}),
    "lora_checkpointing": ("default", {"lora_rank": 8, "checkpointing": True}),
}
SWEEP = [2, 4, 8, 16, 32]
AIMS = {"speed_ratio": 0.97, "memory_ratio": 1.03, "sweep_memory_ratio": 1.03}
WARMUP = 2
MIB = 2**-20


def parse() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, precisions={"bfloat16": "autocast", "float32": "throughout"})
    add = parser.add_argument
    add("--window", type=int, default=256, help="T, tokens a window (default: 256)")
    add("--bptt", type=int, default=4, help="K, windows per segment (default: 4)")
    add("--lanes", type=int, default=8, help="documents read side by side (default: 8)")
    add("--steps", type=int, default=5, help=f"measured steps of a run, after {WARMUP} (default: 5)")
    add("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME", help="default: all")
    sweep = "our peak memory with checkpointing for each K (default: 2 4 8 16 32); --steps counts those of the largest"
    add("--checkpointing-sweep", nargs="*", type=int, metavar="K", help=sweep)
    args = check_arguments(parser, parser.parse_args())
    if args.checkpointing_sweep == []:
        args.checkpointing_sweep = SWEEP
    return args


def compare(args: Namespace) -> dict:
    variants = {name: vars(args) | {"variant": name} for name in args.variants}
    result = {
        "benchmark": "training",
        "aims": AIMS,
        "variants": summarise(interleave(__file__, variants, args.repeats), PEER),
    }
    rows = []
    for name, row in result["variants"].items():
        aims = (
            {} if name in (PEER, PEER_CHECKPOINTING, "checkpointing") else AIMS
        )  # checkpointing trades speed for memory
        speed = ratio(row, "speed_ratio", at_least=aims.get("speed_ratio"))
        memory = ratio(row, "memory_ratio", at_most=aims.get("memory_ratio"))
        rows.append([name, number(row, "tokens_per_second"), speed, number(row, "peak_memory_bytes", MIB), memory])
    if rows:
        print_table(["variant", "tokens/s", "ratio (aim >= 0.97)", "peak MiB", "ratio (aim <= 1.03)"], rows)
    if args.checkpointing_sweep:
        result["checkpointing_sweep"] = _sweep(args)
    return result


def _sweep(args):
    """Peak memory as K grows, everything else unchanged, after as many windows: a heap takes some tens to settle."""
    settings, longest = vars(args) | {"variant": "checkpointing"}, max(args.checkpointing_sweep)
    variants = {
        f"K={windows}": settings | {"bptt": windows, "steps": args.steps * longest // windows}
        for windows in args.checkpointing_sweep
    }
    first = next(iter(variants))
    summary = summarise(interleave(__file__, variants, args.repeats), first)
    rows = []
    for name, row in summary.items():
        memory = ratio(row, "memory_ratio", at_most=AIMS["sweep_memory_ratio"])
        rows.append([name, number(row, "tokens_per_second"), number(row, "peak_memory_bytes", MIB), memory])
    print_table(["checkpointing", "tokens/s", "peak MiB", f"ratio to {first} (aim <= 1.03)"], rows)
    return summary


def measure(settings: Namespace) -> dict:
    """One variant: speed of its median step, and peak memory."""
    from recur_gpt2.models.adapters import add_lora
    from recur_gpt2.training.arguments import TrainingArguments
    from recur_gpt2.training.optimizer import make_optimizer

    device, before = torch.device(settings.device), resident()
    recurrence, changed = VARIANTS[settings.variant]
    arguments = TrainingArguments(lanes=settings.lanes, bptt=settings.bptt, **changed)
    model = build_transformers(settings) if recurrence is None else build_ours(settings, recurrence)
    if arguments.lora_rank:
        add_lora(model, arguments.lora_rank, settings.model)
    model.to(device).train()
    loss_of = (_transformers_loss if recurrence is None else _our_loss)(model, arguments, settings)
    optimizer = make_optimizer(model, arguments)
    segments = _segments(model.config.vocab_size, settings, device)

    def step():
        """As Trainer's step: the backward pass lies inside autocast too, where checkpointing finds the cast weights."""
        inputs, targets = next(segments)
        synchronize(device)
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
            loss = loss_of(inputs, targets)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        return time.perf_counter() - began, loss.item()

    first_losses = [step()[1] for _ in range(WARMUP)]
    meter = Meter(model)
    with meter:
        seconds = sorted(step()[0] for _ in range(settings.steps))[settings.steps // 2]
    tokens = settings.lanes * settings.bptt * settings.window
    peak = peak_memory(meter, before)
    return {
        "tokens_per_second": tokens / seconds,
        "peak_memory_bytes": peak,
        "weight_bytes": weight_bytes(model),
        "first_loss": first_losses[0],
    }


def _segments(vocabulary, settings, device):
    """Endless (B, K, T) random inputs and their targets, the same for all variants."""
    generator = torch.Generator().manual_seed(0)
    shape = settings.lanes, settings.bptt, settings.window
    while True:
        tokens = torch.randint(vocabulary, (shape[0], shape[1] * shape[2] + 1), generator=generator)
        yield tokens[:, :-1].reshape(shape).to(device), tokens[:, 1:].reshape(shape).to(device)


def _transformers_loss(model, arguments, settings):
    if arguments.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    forward = compiled(model, settings)

    def loss(inputs, targets):
        labels = targets.flatten(0, 1)  # (B * K, T), shifted already: every position is scored
        return forward(inputs.flatten(0, 1), labels=labels, shift_labels=labels, use_cache=False).loss

    return loss


def _our_loss(model, arguments, settings):
    from recur_gpt2.data.batches import Segment
    from recur_gpt2.training.loss import SegmentLoss

    model.transformer.forward_windows = compiled(model.transformer.forward_windows, settings)
    segment_loss, state = SegmentLoss(model, arguments), None
    inside = torch.zeros(settings.lanes, settings.bptt, dtype=torch.bool)  # no document starts: memory everywhere
    index = inside.long()

    def loss(inputs, targets):
        nonlocal state
        state = None if state is None else state.detach()
        total, state = segment_loss(Segment(inputs, targets, inside, index, index), state)
        return total / targets.numel()

    return loss


if __name__ == "__main__":
    sys.exit(run(parse, measure, compare))
