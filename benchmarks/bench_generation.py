"""Writing text of any length beside transformers' GPT-2: speed, memory, and what the text is worth.

    python benchmarks/bench_generation.py                        # all four tables, data/gpt2-mini
    python benchmarks/bench_generation.py --model gpt2 --parts within beyond    # GPT-2 small's shape
    python benchmarks/bench_generation.py --parts text --ours data/recur-gpt2-mini

within: both `generate()`, as far as the model has positions. beyond: from there on transformers has no generate(); what
people do is to drop the older half of the text when the positions are full and read the rest again, in a loop around
the model ("drop half") or calling generate() again ("drop half, generate()"), or to read a full window again for every
token ("sliding"). Ours is measured both ways too: generate(), and in a loop.
long: memory and time for a token, early and late in a text. text: what the base GPT-2 thinks of what each writes, how
much of it is new (distinct n-grams over all).
"""

from __future__ import annotations

import argparse
import sys
import time
from argparse import Namespace

import torch
from common import (
    GPT2_SHAPE,
    PEER,
    add_arguments,
    build_ours,
    build_transformers,
    check_arguments,
    fresh,
    interleave,
    number,
    print_table,
    ratio,
    run,
    spread,
    summarise,
    synchronize,
)
from transformers import DynamicCache

from recur_gpt2.models.outputs import CACHE
from recur_gpt2.utils.measure import Meter, peak_resident

PROMPT = 16  # tokens
MIB = 2**-20
PARTS = ["within", "beyond", "long", "text"]
AIMS = {"within": 1.0, "drop half": 1.3, "drop half, generate()": 1.3, "sliding": 20.0, "late": 1.05, "memory": 1.01}
WRITERS = {"drop half": "drop_half", "drop half, generate()": "generate_again", "sliding": "sliding"}


def parse() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, precisions={"float32": "throughout", "bfloat16": "weights too"})
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    add("--window", type=int, default=256, help="T, ours (default: 256)")
    add("--batches", type=int, nargs="+", default=[1, 16], help="texts side by side (default: 1 16)")
    add("--tokens", type=int, default=3000, help="of a text beyond all positions (default: 3000)")
    two = {"type": int, "nargs": 2, "metavar": "N"}
    add("--long", default=[1000, 50000], help="memory after writing so many tokens (default: 1000 50000)", **two)
    add("--late", default=[300, 20000], help="time for a token behind so many (default: 300 20000)", **two)
    add("--text-tokens", type=int, default=4000, help="of the texts that are judged (default: 4000)")
    add("--ours", help="finetuned model for the texts; default: --model with untrained recurrence")
    args = check_arguments(parser, parser.parse_args())
    if "text" in args.parts and args.model == GPT2_SHAPE:
        parser.error("random weights write nothing to judge; leave out --parts text, or give a --model")
    return args


def compare(args: Namespace) -> dict:
    result = {"benchmark": "generation", "aims": AIMS}
    for part in args.parts:
        result[part] = {"within": _within, "beyond": _beyond, "long": _long, "text": _text}[part](args)
    return result


def _within(args):
    found = {}
    for rows in args.batches:
        runs = _runs(args, rows, {PEER: {}, "ours": {}})
        found[str(rows)] = _speeds(f"within its positions, {rows} texts", runs, PEER, AIMS["within"])
    return found


def _beyond(args):
    """Ratios are to each other way."""
    found = {}
    for rows in args.batches:
        long = {"new_tokens": args.tokens}
        others = {name: {"variant": variant} | long for name, variant in WRITERS.items()}
        others["sliding"]["new_tokens"] = max(2, 24 // rows)  # each reads a whole window
        ours = {"ours": long, "ours, in a loop": {"variant": "loop"} | long}
        runs = _runs(args, rows, others | ours)
        for name in WRITERS:
            these = {each: runs[each] for each in (name, *ours)}
            found[f"{rows}, {name}"] = _speeds(f"beyond them, {rows} texts", these, name, AIMS[name])
    return found


def _runs(args, rows, variants):
    settings = vars(args) | {"part": "speed", "rows": rows, "new_tokens": None}
    each = {name: settings | {"variant": name} | changed for name, changed in variants.items()}
    return interleave(__file__, each, args.repeats)


def _speeds(head, runs, base, aim):
    summary = summarise(runs, base)
    table = [
        [
            name,
            number(row, "tokens_per_second"),
            ratio(row, "speed_ratio", at_least=aim if name.startswith("ours") else None),
            number(row, "peak_memory_bytes", MIB),
        ]
        for name, row in summary.items()
    ]
    print_table([head, "tokens/s", f"ratio to {base} (aim >= {aim:g})", "peak MiB"], table)
    return summary


def _long(args):
    settings = vars(args) | {"part": "long", "variant": "ours", "rows": 1}
    found = {str(count): fresh(__file__, settings | {"new_tokens": count}) for count in args.long}
    found["late"] = fresh(__file__, settings | {"part": "late"})
    if any("error" in each for each in found.values()):
        return found
    first, last = (found[str(count)]["peak_resident_bytes"] for count in args.long)
    early, late = (sorted(each)[len(each) // 2] for each in found["late"]["seconds"])
    found["memory_ratio"] = spread([last / first])
    found["time_ratio"] = spread([b / a for a, b in zip(*found["late"]["seconds"], strict=True)])
    memory = [f"{each * MIB:,.1f} MiB" for each in (first, last)]
    times = [f"{each * 1e3:.3f} ms" for each in (early, late)]
    rows = [
        ["peak memory of the process", *memory, ratio(found, "memory_ratio", at_most=AIMS["memory"])],
        ["time for a token", *times, ratio(found, "time_ratio", at_most=AIMS["late"])],
    ]
    at = [f"after {a:,} / at {b:,}" for a, b in zip(args.long, args.late, strict=True)]
    print_table(["one long text", *at, "ratio"], rows)
    return found


def _text(args):
    settings = vars(args) | {"part": "text", "rows": 1, "new_tokens": args.text_tokens}
    found = {name: fresh(__file__, settings | {"variant": name}) for name in ("drop_half", "ours")}
    if any("error" in each for each in found.values()):
        return found
    columns = ["perplexity", "distinct_1", "distinct_2", "distinct_3", "distinct_4"]
    rows = [[name, *(f"{each[column]:.3f}" for column in columns)] for name, each in found.items()]
    print_table(["text", "perplexity under the base", "distinct-1", "-2", "-3", "-4"], rows)
    return found


def measure(settings: Namespace) -> dict:
    device = torch.device(settings.device)
    dtype = torch.bfloat16 if settings.precision == "bfloat16" else torch.float32
    ours = settings.variant in ("ours", "loop")
    model = (_ours(settings) if ours else build_transformers(settings)).to(device, dtype).eval()
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(1, model.config.vocab_size - 1, (settings.rows, PROMPT), generator=generator).to(device)
    loops = {"loop": _loop, "drop_half": _drop_half, "generate_again": _generate_again, "sliding": _sliding}
    write = ({PEER: _generate, "ours": _generate} | loops)[settings.variant]
    if settings.part == "text":
        return _judged(settings, write(model, prompt, settings.new_tokens, draw=_sampled)[0, PROMPT:])
    if settings.part == "late":
        return {"seconds": _by_turns(model, settings.late)}
    count = settings.new_tokens or model.config.n_positions - PROMPT
    write(model, prompt, min(8, count))
    synchronize(device)
    with torch.no_grad(), Meter(model) as meter:
        began = time.perf_counter()
        write(model, prompt, count)
        synchronize(device)
        seconds = time.perf_counter() - began
    found = {"tokens_per_second": settings.rows * count / seconds, "peak_memory_bytes": meter.peak_memory_bytes}
    return found | {"peak_resident_bytes": peak_resident()}


def _ours(settings):
    if settings.part == "text" and settings.ours:
        from recur_gpt2.models.loading import load_any

        return load_any(settings.ours)
    return build_ours(settings, "default")


def _by_turns(model, places, rounds=12):
    """Seconds for a token behind a text of each length: medians of a window's tokens, in turns, since a machine's speed
    changes with the minutes. The texts are read, which leaves the state that writing them would."""
    seconds = [[] for _ in places]
    for turn in range(rounds + 1):
        for each, place in zip(seconds, places, strict=True):
            times = []
            text = torch.randint(1, model.config.vocab_size - 1, (1, place), device=model.device)
            _generate(model, text, model.config.window, times=times)
            each.extend([sorted(times)[len(times) // 2]] if turn else [])  # the first to warm up
    return seconds


class _Clock:
    """A streamer that notes when each token came."""

    def __init__(self, times):
        self.times, self.last = times, None

    def put(self, value):
        now = time.perf_counter()
        if self.last is not None:
            self.times.append(now - self.last)
        self.last = now

    def end(self):
        pass


def _sampled(logits):
    """temperature 0.8, top-p 0.95."""
    probabilities, order = (logits.float() / 0.8).softmax(dim=-1).sort(dim=-1, descending=True)
    kept = probabilities.cumsum(dim=-1) - probabilities < 0.95
    return order.gather(-1, torch.multinomial(probabilities * kept, 1))


def _greedy(logits):
    return logits.argmax(dim=-1, keepdim=True)


def _generate(model, prompt, count, *, times=None, draw=None):
    """`generate()`; seconds between tokens go to `times`, of one text."""
    options = (
        {"do_sample": False} if draw is None else {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0}
    )
    torch.manual_seed(0)
    streamer = None if times is None else _Clock(times)
    mask = torch.ones_like(prompt)
    options |= {"attention_mask": mask, "eos_token_id": None, "pad_token_id": 0, "streamer": streamer}
    return model.generate(prompt, max_new_tokens=count, min_new_tokens=count, **options)


def _generate_again(model, ids, count):
    """`generate()` until the positions are full, then again behind the newer half of the text."""
    end = ids.shape[1] + count
    while ids.shape[1] < end:
        kept = ids[:, -model.config.n_positions // 2 :]
        new = min(end - ids.shape[1], model.config.n_positions - kept.shape[1])
        ids = torch.cat((ids, _generate(model, kept, new)[:, -new:]), dim=1)
    return ids


@torch.no_grad()
def _drop_half(model, ids, count, *, draw=_greedy):
    """transformers' own cache; when the positions are full, the newer half of the text is read again."""
    torch.manual_seed(0)
    cache, unread = DynamicCache(config=model.config), ids
    for _ in range(count):
        if cache.get_seq_length() + unread.shape[1] > model.config.n_positions:
            cache, unread = DynamicCache(config=model.config), ids[:, -model.config.n_positions // 2 :]
        logits = model(unread, **{CACHE: cache}, use_cache=True, logits_to_keep=1).logits[:, -1]
        unread = draw(logits)
        ids = torch.cat((ids, unread), dim=1)
    return ids


@torch.no_grad()
def _loop(model, ids, count, *, draw=_greedy):
    """Ours without `generate()`, as the other ways beyond all positions are."""
    torch.manual_seed(0)
    cache, unread = None, ids
    for _ in range(count):
        out = model(unread, cache=cache, use_cache=True, logits_to_keep=1)
        cache, unread = out[CACHE], draw(out.logits[:, -1])
        ids = torch.cat((ids, unread), dim=1)
    return ids


@torch.no_grad()
def _sliding(model, ids, count, *, draw=_greedy):
    """A full window read again for each token."""
    ids = torch.cat((ids, ids.new_ones(len(ids), model.config.n_positions)), dim=1)
    for _ in range(count):
        window = ids[:, -model.config.n_positions :]
        ids = torch.cat((ids, draw(model(window, use_cache=False, logits_to_keep=1).logits[:, -1])), dim=1)
    return ids


def _judged(settings, tokens):
    """Perplexity under the base GPT-2, read as far as it has positions at a time, and distinct n-grams over all."""
    base, total = build_transformers(settings).eval(), 0.0
    with torch.no_grad():
        for piece in tokens[None].split(base.config.n_positions, dim=1):
            total += base(piece, labels=piece).loss.item() * (piece.shape[1] - 1) if piece.shape[1] > 1 else 0
    scored = len(tokens) - -(-len(tokens) // base.config.n_positions)
    found = {"perplexity": float(torch.tensor(total / scored).exp()), "tokens": len(tokens)}
    words = tokens.tolist()
    for n in range(1, 5):
        grams = list(zip(*(words[start:] for start in range(n)), strict=False))
        found[f"distinct_{n}"] = len(set(grams)) / len(grams)
    return found


if __name__ == "__main__":
    sys.exit(run(parse, measure, compare))
