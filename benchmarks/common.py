"""What the benchmarks share: fresh processes, the two models to compare, memory, medians, the last line.

Every measurement is a process of its own, so that none inherits another's heap, caches or compiled code. Variants take
turns (A B A B), and a ratio compares runs of the same round, so that a drifting machine favours none of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from recur_gpt2 import RecurGPT2Config, RecurGPT2LMHeadModel
from recur_gpt2.utils.allocator import tune_allocator
from recur_gpt2.utils.measure import Meter, peak_resident
from recur_gpt2.utils.thread_cache import tuned_environment

ROOT = Path(__file__).resolve().parents[1]
CHILD = "_measure"  # hidden subcommand: measure one variant, print one JSON object
PEER = "transformers"
GPT2_SHAPE = "gpt2"
RATIOS = {"tokens_per_second": "speed_ratio", "peak_memory_bytes": "memory_ratio", "above_bytes": "above_ratio"}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
RECOMPILES = 64  # torch.compile specialises on each layer; beyond its default of 8 it would silently stop compiling


def run(
    parse: Callable[[], Namespace], measure: Callable[[Namespace], dict], compare: Callable[[Namespace], dict]
) -> int:
    """A benchmark's main: compares in the process that was called, measures in those that it starts."""
    if sys.argv[1:2] == [CHILD]:
        tune_allocator()
        transformers.utils.logging.disable_progress_bar()
        print(json.dumps(measure(Namespace(**json.loads(sys.argv[2])))))
        return 0
    args = parse()
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    result = {"settings": settings, "machine": machine(args.device)} | compare(args)
    line = json.dumps(result)
    if args.json:
        Path(args.json).write_text(line + "\n")
    print(line)
    return 1 if '"error"' in line else 0


def add_arguments(parser: argparse.ArgumentParser, *, precisions: dict[str, str]) -> None:
    """The arguments that both benchmarks take. `precisions`: name -> what it means; the first is the default."""
    add = parser.add_argument
    add("--model", default="data/gpt2-mini", help="folder of a GPT-2, or gpt2: GPT-2 small's shape, random weights")
    add("--layers", type=int, help="with --model gpt2: another number of layers")
    add("--width", type=int, help="with --model gpt2: another width; a head has 64")
    add("--vocab-size", type=int, help="with --model gpt2: another vocabulary")
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in precisions.items())
    add("--precision", choices=list(precisions), default=next(iter(precisions)), help=meanings)
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compile", nargs="?", const="default", metavar="MODE", help="torch.compile on both sides (CUDA only)")
    add("--repeats", type=int, default=3, help="rounds, in each of which every variant runs once (default: 3)")
    add("--json", metavar="FILE", help="write the last line to a file too")


def check_arguments(parser: argparse.ArgumentParser, args: Namespace) -> Namespace:
    """Refuse contradictions, with the way out."""
    if args.model != GPT2_SHAPE and (args.layers or args.width or args.vocab_size):
        parser.error("--layers, --width and --vocab-size shape a model of random weights; add --model gpt2")
    if args.model != GPT2_SHAPE and not (_folder(args.model) / "config.json").exists():
        parser.error(f"--model {args.model} has no config.json; give a GPT-2's folder, or gpt2 for random weights")
    if args.compile and args.device != "cuda":
        parser.error("--compile is for --device cuda; leave it out on a CPU")
    return args


def machine(device: str) -> dict:
    """Where and with what was measured."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    versions = {"python": platform.python_version(), "torch": torch.__version__, PEER: transformers.__version__}
    return {"device": name, "threads": torch.get_num_threads()} | versions


def interleave(script: str, variants: dict[str, dict], repeats: int) -> dict[str, list[dict]]:
    """Run every variant's settings once a round, each in a fresh process. -> what `measure` returned, by variant.

    A variant that fails has {"error": ...} for that round; the others go on.
    """
    runs = {name: [] for name in variants}
    for number in range(repeats):
        for name, settings in variants.items():
            runs[name].append(fresh(script, settings))
            print(f"round {number + 1}/{repeats}: {name}: {_brief(runs[name][-1])}", file=sys.stderr, flush=True)
    return runs


def fresh(script: str, settings: dict) -> dict:
    """Measure in a process of its own."""
    command = [sys.executable, script, CHILD, json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, env=tuned_environment())
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def summarise(runs: dict[str, list[dict]], baseline: str) -> dict[str, dict]:
    """Each variant's measurements, and their ratios to `baseline`'s in the same round, as {median, min, max}."""
    summary = {}
    for name, rounds in runs.items():
        errors = [each["error"] for each in rounds if "error" in each]
        if errors:
            summary[name] = {"error": errors[0]}
            continue
        summary[name] = {key: spread([each[key] for each in rounds]) for key in rounds[0]}
        base = runs.get(baseline, [])
        if base and not any("error" in each for each in base):
            for key in RATIOS.keys() & rounds[0].keys():
                summary[name][RATIOS[key]] = spread([a[key] / b[key] for a, b in zip(rounds, base, strict=True)])
    return summary


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(summary: dict, key: str, *, at_least: float | None = None, at_most: float | None = None) -> str:
    """A ratio as it stands in a table: median, range, and whether the aim is met."""
    if key not in summary:
        return "-"
    median, low, high = (summary[key][part] for part in ("median", "min", "max"))
    met = (at_least is None or median >= at_least) and (at_most is None or median <= at_most)
    verdict = "" if at_least is None and at_most is None else " ok" if met else " missed"
    return f"{median:.3f} ({low:.3f}-{high:.3f}){verdict}"


def number(summary: dict, key: str, scale: float = 1.0) -> str:
    return f"{summary[key]['median'] * scale:,.0f}" if key in summary else "failed"


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Columns, the first one to the left."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, ["-" * width for width in widths], *rows):
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells]))
    print()


def resident() -> int:
    """Bytes of memory that this process holds now; taken before a model is built, the base of its peak."""
    with Meter(torch.nn.Linear(1, 1)):  # sets the peak back to what is resident
        pass
    return peak_resident()


def peak_memory(measured: Meter, before: int) -> int:
    """The peak since `measured` began: PyTorch's count on CUDA, resident memory above `before` on the CPU."""
    return measured.result.peak_memory_bytes if measured.device.type == "cuda" else peak_resident() - before


def build_transformers(settings: Namespace) -> GPT2LMHeadModel:
    """transformers' own GPT-2, in float32, with PyTorch's fused attention."""
    if settings.model == GPT2_SHAPE:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(GPT2Config(**_shape(settings)), attn_implementation="sdpa")
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"} | NO_DROPOUT
    return GPT2LMHeadModel.from_pretrained(_folder(settings.model), **options)


def build_ours(settings: Namespace, recurrence: str) -> RecurGPT2LMHeadModel:
    """Our model of the same weights."""
    options = {"window": settings.window, "recurrence": recurrence}
    if settings.model != GPT2_SHAPE:
        return RecurGPT2LMHeadModel.from_gpt2(str(_folder(settings.model)), **options, **NO_DROPOUT)
    model = RecurGPT2LMHeadModel(RecurGPT2Config(**_shape(settings), **options))
    model.load_state_dict(build_transformers(settings).state_dict(), strict=False)
    return model


def compiled(function: Callable, settings: Namespace) -> Callable:
    """The function, through torch.compile if the settings say so."""
    if not settings.compile:
        return function
    torch._dynamo.config.recompile_limit = RECOMPILES
    return torch.compile(function, mode=settings.compile)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _processor():
    """The processor's name, where Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _shape(settings):
    width, vocabulary = settings.width or 768, settings.vocab_size or 50257
    return NO_DROPOUT | {
        "n_layer": settings.layers or 12,
        "n_embd": width,
        "n_head": max(1, width // 64),
        "vocab_size": vocabulary,
        "bos_token_id": vocabulary - 1,
        "eos_token_id": vocabulary - 1,
    }


def _folder(model):
    return Path(model) if Path(model).exists() else ROOT / model


def _brief(measured):
    if "error" in measured:
        return measured["error"]
    return f"{measured['tokens_per_second']:,.0f} tokens/s, {measured['peak_memory_bytes'] / 2**20:,.0f} MiB"
