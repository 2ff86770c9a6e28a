"""Linear against softmax attention: forward plus backward of one layer's attention.

    python benchmarks/bench_linear_attention.py
    python benchmarks/bench_linear_attention.py --lengths 512 --precisions float32 --chunks 32 64 128
    python benchmarks/bench_linear_attention.py --device cuda --tokens 65536    # beside flash-linear-attention's

On the CPU in CPU time of one thread, on CUDA in wall-clock time, there with `chunk_linear_attn` of the package
flash-linear-attention too, if it is installed.

Kernels take turns, and a ratio compares runs of the same round. Every call reads --tokens tokens (or one row, if that
is longer) with 4 heads of 64; queries, keys and values lie in memory as a projection leaves them, features as a map
does. "t2r + chunked" is all that stands in softmax attention's place: the map on queries and keys, then the operator;
so is "hedgehog + near", where the --near nearest places keep softmax. "naive" is left out beyond 1,024 tokens. The last
line is one JSON object.
"""

import argparse
import json
import statistics
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from common import machine, print_table, spread
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

from recur_gpt2.ops.feature_maps import make_feature_map
from recur_gpt2.ops.hybrid import MixingGate, hybrid_attention
from recur_gpt2.ops.linear import CHUNK, absorb, chunked, naive, step
from recur_gpt2.ops.softmax import window_attention
from recur_gpt2.utils.allocator import tune_allocator

HEADS, WIDTH = 4, 64
NAIVE_LIMIT = 1024
BASELINE = "sdpa"
AIMS = {256: 1.5, 512: 1.0}  # at most this many times SDPA's time, at this length and beyond up to the next


def main() -> None:
    args = parse()
    tune_allocator()
    torch.set_num_threads(1)
    result = {
        "benchmark": "linear_attention",
        "settings": vars(args),
        "machine": machine(args.device),
        "rows": [],
        "step": [],
    }
    for precision in args.precisions:
        for features in args.features:
            result["rows"] += (rows := compare(args, precision, features))
            show(rows, f"{precision}, k = {features}: milliseconds, and times {BASELINE}'s time")
        result["step"] += [time_step(batch, getattr(torch, precision), args) for batch in (1, 32)]
    for row in result["step"]:
        print(f"step, {row['precision']}, batch {row['batch']}: {row['microseconds']:.0f} us a token")
    line = json.dumps(result)
    if args.json:
        Path(args.json).write_text(line + "\n")
    print(line)


def parse() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096], help="T")
    add("--features", type=int, nargs="+", default=[32, 64], help="k")
    add("--precisions", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    add("--chunks", type=int, nargs="+", default=[CHUNK], help="tokens a chunk, each a kernel of its own")
    add("--near", type=int, default=64, help="w, nearest places (default: 64)")
    add("--tokens", type=int, default=2048, help="tokens a call, over as many rows as they fill")
    add("--repeats", type=int, default=5, help="rounds, in each of which every kernel runs once")
    add("--json", metavar="FILE", help="write the last line to a file too")
    return parser.parse_args()


def compare(args: Namespace, precision: str, features: int) -> list[dict]:
    """One row of the table for each length and kernel."""
    rows = []
    for length in args.lengths:
        times = interleave(args, length, features, getattr(torch, precision))
        for name, each in times.items():
            against = spread([own / base for own, base in zip(each, times[BASELINE], strict=True)])
            row = {"precision": precision, "features": features, "length": length, "kernel": name}
            rows.append(row | {"milliseconds": statistics.median(each), "times_sdpa": against})
    return rows


def interleave(args: Namespace, length: int, features: int, dtype: torch.dtype) -> dict[str, list[float]]:
    """Milliseconds of each kernel in each round, after one round to warm up."""
    torch.manual_seed(0)
    kernels = softmax_kernels(args, length) | linear_kernels(args, length, features, dtype)
    times = {name: [] for name in kernels}
    for _ in range(1 + args.repeats):
        for name, (kernel, make_inputs) in kernels.items():
            times[name].append(milliseconds(kernel, make_inputs(dtype)))
    return {name: each[1:] for name, each in times.items()}


def softmax_kernels(args, length):
    """{name: (function, its inputs' maker)}"""
    rows = max(1, args.tokens // length)
    nobody = torch.zeros(rows, dtype=torch.bool)
    ours = partial(window_attention, memory=None, has_memory=nobody, scale=WIDTH**-0.5)
    inputs = partial(projected, rows, length, args.device)
    return {BASELINE: (partial(sdpa, is_causal=True), inputs), "window_attention": (ours, inputs)}


def linear_kernels(args, length, features, dtype):
    rows = max(1, args.tokens // length)
    there = {"device": args.device, "dtype": dtype}
    feature_map = make_feature_map("t2r", HEADS, WIDTH, features).to(**there)

    def mapped(query, key, value):
        return chunked(*feature_map.features(query, key), value)

    near_map = make_feature_map("hedgehog", HEADS, WIDTH, features).to(**there)
    gate = MixingGate(HEADS, WIDTH, args.near).to(args.device)
    in_front = (torch.arange(args.near + length, device=args.device) >= args.near).expand(rows, -1)  # nothing is

    def near(query, key, value):
        key, value = (pad(each, (0, 0, args.near, 0)) for each in (key, value))
        phi = near_map.features(query, key[:, :, :length])
        scaled = query * WIDTH**-0.5
        return hybrid_attention(scaled, key, value, *phi, gate(scaled), mask=in_front)

    inputs = partial(mapped_inputs, rows, length, features, args.device)
    kernels = {f"chunked, C = {size}": (partial(chunked, chunk=size), inputs) for size in args.chunks if size <= length}
    if args.device == "cuda" and (theirs := flash_linear_attention()) is not None:
        kernels["flash-linear-attention"] = (theirs, inputs)
    kernels["t2r + chunked"] = (mapped, partial(projected, rows, length, args.device))
    kernels["hedgehog + near"] = (near, partial(projected, rows, length, args.device))
    if length <= NAIVE_LIMIT:
        kernels["naive"] = (naive, inputs)
    return kernels


def flash_linear_attention():
    """The other package's kernel, with arguments as ours; None where it is not installed."""
    try:
        from fla.ops.linear_attn import chunk_linear_attn
    except ImportError:
        return None

    def kernel(query, key, value):
        by_token = (each.transpose(1, 2) for each in (query, key, value))  # (B, T, H, ...)
        return chunk_linear_attn(*by_token, scale=1.0, normalize=True)[0]

    return kernel


def projected(rows, length, device, dtype):
    """q, k and v: (B, T, 3, H, d) in memory, seen as (B, H, T, d)."""
    parts = torch.randn(rows, length, 3, HEADS, WIDTH, dtype=dtype, device=device).unbind(dim=2)
    return [part.transpose(1, 2).requires_grad_() for part in parts]


def mapped_inputs(rows, length, features, device, dtype):
    """phi(q) and phi(k) (B, H, T, k), and v."""
    shape = rows, HEADS, length, features
    phi = [torch.rand(shape, dtype=dtype, device=device).requires_grad_() for _ in range(2)]
    return [*phi, projected(rows, length, device, dtype)[2]]


def milliseconds(kernel, inputs):
    """Time of forward plus backward."""
    began = now(inputs[0].device)
    out = kernel(*inputs)
    out = out[0] if isinstance(out, tuple) else out
    out.backward(torch.ones_like(out))
    return 1e3 * (now(inputs[0].device) - began)


def now(device):
    """Seconds: of this process on the CPU, of the clock once a GPU is done."""
    if torch.device(device).type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def time_step(batch, dtype, args):
    """Median time of `step` with the largest k."""
    query, key, value = mapped_inputs(batch, 1, max(args.features), args.device, dtype)
    state, times = absorb(key, value), []
    for _ in range(50 * args.repeats):
        began = now(args.device)
        _, state = step(query, key, value, state)
        times.append(1e6 * (now(args.device) - began))
    return {"precision": str(dtype)[6:], "batch": batch, "microseconds": statistics.median(times)}


def show(rows, title):
    """Lengths down, kernels across."""
    names = list(dict.fromkeys(row["kernel"] for row in rows))
    cells = {(row["length"], row["kernel"]): cell(row) for row in rows}
    lengths = dict.fromkeys(row["length"] for row in rows)
    print(title)
    print_table(
        ["T", *names], [[str(length), *(cells.get((length, name), "-") for name in names)] for length in lengths]
    )


def cell(row):
    """Milliseconds, the ratio and, for chunked, whether its aim is met."""
    ratio = row["times_sdpa"]["median"]
    aim = next((limit for start, limit in reversed(AIMS.items()) if row["length"] >= start), None)
    verdict = "" if aim is None or "chunked" not in row["kernel"] else " ok" if ratio <= aim else " missed"
    return f"{row['milliseconds']:.1f} ({ratio:.2f}{verdict})"


if __name__ == "__main__":
    main()
