"""Kernels for attention with memory on the CPU: what attention.py chooses between.

    python benchmarks/bench_attention.py
    python benchmarks/bench_attention.py --precision float32 --windows 256 1024

Times forward plus backward of one layer's attention over 2,048 tokens with 4 heads of 64 and 33 memory slots, in CPU
time of one thread, so that other work on the machine does not count. The last line is one JSON object.
"""

import argparse
import json
import statistics
import time

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from recur_gpt2 import attention
from recur_gpt2.allocator import tune_allocator

TOKENS, HEADS, WIDTH = 2048, 4, 64
OPTIONS = {"scale": WIDTH**-0.5, "dropout": 0.0}


def kernels(memory, slots, length):
    """{name: function of query, key, value}"""
    visible = attention._visible(length, slots, None, torch.device("cpu"))

    def with_memory(kernel):
        return lambda query, key, value: kernel(query, *attention._prepend(memory, key, value))

    return {
        "no memory, sdpa": lambda q, k, v: sdpa(q, k, v, is_causal=True),
        "sdpa, mask": with_memory(lambda q, k, v: sdpa(q, k, v, attn_mask=visible)),
        "sdpa, zero rows": with_memory(
            lambda q, k, v: attention._causal_from_the_top(q, k, v, slots, scale=OPTIONS["scale"], dropout_p=0.0)
        ),
        "products": with_memory(lambda q, k, v: attention._products(q, k, v, slots, None, *OPTIONS.values())),
    }


def milliseconds(kernel, shape, dtype, repeats):
    """Median CPU time of forward plus backward."""
    times = []
    for _ in range(repeats + 1):
        inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
        began = time.process_time()
        out = kernel(*inputs)
        out.backward(torch.ones_like(out))
        times.append(1e3 * (time.process_time() - began))
    return statistics.median(times[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--slots", type=int, default=33)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    tune_allocator()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype, rows = getattr(torch, args.precision), []
    for window in args.windows:
        rows_at_once = max(1, TOKENS // window)
        memory = tuple(torch.randn(rows_at_once, HEADS, args.slots, WIDTH, dtype=dtype) for _ in range(2))
        shape = (rows_at_once, HEADS, window, WIDTH)
        for name, kernel in kernels(memory, args.slots, window).items():
            rows.append({"window": window, "kernel": name, "ms": milliseconds(kernel, shape, dtype, args.repeats)})
            print(f"{window:6d}  {name:18s} {rows[-1]['ms']:8.1f} ms", flush=True)
    print(json.dumps({"precision": args.precision, "slots": args.slots, "rows": rows}))


if __name__ == "__main__":
    main()
