"""Kernels for attention with memory on the CPU: what softmax.py chooses between.

    python benchmarks/bench_attention.py
    python benchmarks/bench_attention.py --precision float32 --windows 256 1024

Times one layer's attention over 2,048 tokens with 4 heads of 64 and 45 memory slots, forward alone and with the
backward pass, in CPU time of one thread, so that other work on the machine does not count. "In steps": some queries at
a time, with the keys that these may see alone. The last line is one JSON object.
"""

import argparse
import json
import statistics
import time

import torch
from common import print_table
from torch.nn.functional import scaled_dot_product_attention as sdpa

from recur_gpt2.ops import softmax
from recur_gpt2.utils.allocator import tune_allocator

TOKENS, HEADS, WIDTH = 2048, 4, 64


def kernels(memory, slots, length, gradient):
    """{name: function of query, key, value}"""
    future = softmax._future(length, slots, memory[0].dtype)

    def products(query, key, value, bias):
        return softmax._some_products(query, key, value, bias, unread=None, scale=WIDTH**-0.5, dropout=0.0)

    def with_memory(kernel, mask, step):
        return lambda q, k, v: softmax._in_steps(kernel, q, *softmax._prepend(memory, k, v), mask, step)

    step = softmax.QUERIES if gradient else softmax.QUERIES_WITHOUT_GRADIENT
    return {
        "no memory, sdpa": lambda q, k, v: sdpa(q, k, v, is_causal=True),
        "sdpa, mask": with_memory(sdpa, future, length),
        "sdpa, in steps": with_memory(sdpa, future, step),
        "products": with_memory(products, future, length),
        "products, in steps": with_memory(products, future, softmax.queries_in_products(length)),
    }


def milliseconds(kernel, shape, dtype, repeats, gradient):
    """Median CPU time of a call, and of its backward pass if a gradient is wanted."""
    times = []
    for _ in range(repeats + 1):
        inputs = [torch.randn(shape, dtype=dtype, requires_grad=gradient) for _ in range(3)]
        began = time.process_time()
        out = kernel(*inputs)
        if gradient:
            out.backward(torch.ones_like(out))
        times.append(1e3 * (time.process_time() - began))
    return statistics.median(times[1:])


def measure(window, dtype, gradient, args, rows):
    """Adds to `rows` -> the cells of a table's row"""
    at_once = max(1, TOKENS // window)
    memory = tuple(torch.randn(at_once, HEADS, args.slots, WIDTH, dtype=dtype) for _ in range(2))
    shape, cells = (at_once, HEADS, window, WIDTH), []
    for name, kernel in kernels(memory, args.slots, window, gradient).items():
        spent = milliseconds(kernel, shape, dtype, args.repeats, gradient)
        rows.append({"window": window, "kernel": name, "gradient": gradient, "ms": spent})
        cells.append(f"{spent:.1f}")
    return cells


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--slots", type=int, default=45)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    tune_allocator()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype, rows = getattr(torch, args.precision), []
    for gradient in (False, True):
        table = [[f"{window:,}", *measure(window, dtype, gradient, args, rows)] for window in args.windows]
        print("forward and backward:" if gradient else "forward:")
        print_table(["window", *dict.fromkeys(row["kernel"] for row in rows)], table)
    print(json.dumps({"precision": args.precision, "slots": args.slots, "rows": rows}))


if __name__ == "__main__":
    main()
