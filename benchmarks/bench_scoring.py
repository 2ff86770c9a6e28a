"""Scoring speed and memory on one long document, beside transformers' own GPT-2 reading windows apart.

    python benchmarks/bench_scoring.py                                              # data/gpt2-mini
    python benchmarks/bench_scoring.py --model gpt2 --device cuda --batch 64

`transformers` and `disjoint` read the windows apart, `--batch` at a time; recurrent variants read them one after
another, P computed at once; what does not fill such a block is left out. `growth` is the peak memory over that of a
document of a tenth of the tokens (of four blocks, where that is more); tokens are made as they are read, so that it is
not theirs.
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
    fresh,
    interleave,
    number,
    peak_memory,
    print_table,
    ratio,
    resident,
    run,
    spread,
    summarise,
    synchronize,
)
from torch.nn.functional import cross_entropy

from recur_gpt2.models.configuration import RecurGPT2Config
from recur_gpt2.models.flops import flops_per_token
from recur_gpt2.ops.cross_entropy import token_losses
from recur_gpt2.utils.measure import Meter, weight_bytes

VARIANTS = [PEER, "disjoint", "default", "yoshida2020"]
PEAK = "peak"  # the hidden variant that measures the chip
WARMUP_BATCHES = 3
MIB = 2**-20


def parse() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    meanings = {"bfloat16": "weights too", "float32": "throughout", "autocast": "bfloat16 over float32 weights"}
    add_arguments(parser, precisions=meanings)
    add = parser.add_argument
    add("--tokens", type=int, default=200_000, help="length of the document, of random tokens (default: 200000)")
    add("--windows", type=int, nargs="+", default=[128, 256], metavar="T", help="tokens a window (default: 128 256)")
    add("--batch", type=int, default=8, help="windows read side by side where they are read apart (default: 8)")
    add("--parallel-windows", type=int, nargs="+", default=[1, 4, 16, 64], metavar="P", help="default: 1 4 16 64")
    add("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, metavar="NAME", help="default: all")
    add("--peak-tflops", type=float, help="the chip's bf16 peak (CUDA; default: that of a large matrix product)")
    args = check_arguments(parser, parser.parse_args())
    if args.tokens < 20:
        parser.error(f"--tokens {args.tokens} is too short to be compared with a shorter one; give at least 20")
    return args


def compare(args: Namespace) -> dict:
    peak = None
    if args.device == "cuda":
        peak = args.peak_tflops or fresh(__file__, vars(args) | {"variant": PEAK}).get("tflops")
    result = {"benchmark": "scoring", "peak_tflops": peak, "windows": {}}
    for window in args.windows:
        result["windows"][str(window)] = summary = _compare_window(args, window, peak)
        head = [f"window {window}", "tokens/s", "ratio", "peak MiB", "ratio", "growth", "of peak"]
        rows = [
            [
                name,
                number(row, "tokens_per_second"),
                ratio(row, "speed_ratio"),
                number(row, "peak_memory_bytes", MIB),
                ratio(row, "memory_ratio"),
                ratio(row, "growth"),
                f"{row['share_of_peak']['median']:.1%}" if "share_of_peak" in row else "-",
            ]
            for name, row in summary.items()
        ]
        print_table(head, rows)
    return result


def _compare_window(args, window, peak):
    variants = {}
    for name in args.variants:
        apart = name in (PEER, "disjoint")
        for block in [args.batch] if apart else args.parallel_windows:
            settings = vars(args) | {"window": window, "variant": name, "block": block}
            variants[name if apart else f"{name}_p{block}"] = settings
    shorter = {_shorter(name): each | {"tokens": _fewer_tokens(each)} for name, each in variants.items()}
    runs = interleave(__file__, variants | shorter, args.repeats)
    summary = summarise({name: runs[name] for name in variants}, PEER)
    for name, row in summary.items():
        pairs = list(zip(runs[name], runs[_shorter(name)], strict=True))
        if "error" not in row and not any("error" in short for _, short in pairs):
            row["growth"] = spread([long["peak_memory_bytes"] / short["peak_memory_bytes"] for long, short in pairs])
        if "error" not in row and peak:
            row["share_of_peak"] = spread([each["flops_per_second"] / peak / 1e12 for each, _ in pairs])
    return summary


def _shorter(name):
    return f"{name}, shorter document"


def _fewer_tokens(settings):
    """A tenth, but enough for memory to settle: four blocks."""
    return min(settings["tokens"], max(settings["tokens"] // 10, 4 * settings["block"] * settings["window"]))


def measure(settings: Namespace) -> dict:
    """One variant: a whole document, after a few batches to warm up."""
    device = torch.device(settings.device)
    if settings.variant == PEAK:
        return {"tflops": _matmul_tflops(device)}
    before = resident()
    model = build_transformers(settings) if settings.variant == PEER else build_ours(settings, _recurrence(settings))
    model.to(device, torch.bfloat16 if settings.precision == "bfloat16" else None).eval()
    score = (_transformers_scorer if settings.variant == PEER else _our_scorer)(model, settings)
    blocks = max(1, settings.tokens // (settings.block * settings.window))
    # inference mode would keep autocast from caching the cast weights
    with torch.no_grad() if settings.precision == "autocast" else torch.inference_mode():
        score(_document(model, settings, min(blocks, WARMUP_BATCHES)))
        synchronize(device)
        meter = Meter(model)
        with meter:
            began = time.perf_counter()
            nats = score(_document(model, settings, blocks))
            synchronize(device)
            seconds = time.perf_counter() - began
    scored = blocks * settings.block * settings.window
    return {
        "tokens_per_second": scored / seconds,
        "peak_memory_bytes": peak_memory(meter, before),
        "flops_per_second": _flops(model, settings) * scored / seconds,
        "weight_bytes": weight_bytes(model),
        "nats": nats.item() / scored,
    }


def _recurrence(settings):
    return "none" if settings.variant == "disjoint" else settings.variant


def _document(model, settings, blocks):
    """Random tokens, the same for all P on a CPU, a block of windows at a time: inputs and targets, each (P, T)."""
    generator = torch.Generator(model.device).manual_seed(0)
    size = (settings.block, settings.window + 1)
    for _ in range(blocks):
        tokens = torch.randint(model.config.vocab_size, size, generator=generator, device=model.device)
        yield tokens[:, :-1], tokens[:, 1:]


def _transformers_scorer(model, settings):
    """Batches of windows apart: logits of a batch, its loss in float32."""
    forward = compiled(model, settings)

    def batch(inputs, targets):  # a function, so that one batch's logits are gone before the next one's are made
        logits = forward(inputs, use_cache=False).logits.float()
        return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").sum(dtype=torch.float64)

    def score(document):
        with _autocast(model, settings):
            return sum(batch(inputs, targets) for inputs, targets in document)

    return score


def _our_scorer(model, settings):
    """Windows as rows of a batch where they are read apart, otherwise as one row's windows, with its state."""
    read = compiled(model.transformer.forward_windows, settings)
    apart = settings.variant == "disjoint"
    head = model.lm_head.weight

    def score(document):
        nats, state = 0, None
        weight = head.to(torch.bfloat16) if settings.precision == "autocast" else head
        with _autocast(model, settings):
            for inputs, targets in document:
                ids = inputs.unsqueeze(1 if apart else 0)  # (P, 1, T) or (1, P, T)
                hidden, state = read(ids, torch.zeros(ids.shape[:2], dtype=torch.bool), None if apart else state)
                each = token_losses(hidden.to(weight.dtype), weight, targets.reshape(ids.shape))
                nats += each.sum(dtype=torch.float64)
        return nats

    return score


def _autocast(model, settings):
    return torch.autocast(model.device.type, torch.bfloat16, enabled=settings.precision == "autocast")


def _flops(model, settings):
    """FLOPs for a token, counted alike on both sides."""
    if settings.variant != PEER:
        return flops_per_token(model.config)
    fields = {name: getattr(model.config, name) for name in ("n_layer", "n_embd", "n_head", "n_inner", "vocab_size")}
    return flops_per_token(RecurGPT2Config(**fields, window=settings.window, recurrence="none"), memory=False)


def _matmul_tflops(device, size=8192, products=10):
    """What a large bf16 matrix product of random numbers reaches: the mean of ten, after three to warm up."""
    left, right = torch.randn(2, size, size, device=device).to(torch.bfloat16)
    for _ in range(3):
        left @ right
    synchronize(device)
    began = time.perf_counter()
    for _ in range(products):
        left @ right
    synchronize(device)
    return 2 * size**3 * products / (time.perf_counter() - began) / 1e12


if __name__ == "__main__":
    sys.exit(run(parse, measure, compare))
