"""What a task costs in a process of its own: peak memory above what the libraries take, and speed.

    python -m recur_gpt2.budget.worker '{"model": "data/gpt2-mini", "task": "train", ...}'

prints one JSON object. Tokens are random: neither memory nor speed depends on them. With a budget, the system refuses
the process much more (RLIMIT_DATA), and running out of it, there or by what was in use, is a result like any other. Not
for quality.
"""

from __future__ import annotations

import gc
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from ..data.batches import Segment
from ..embedding.embedder import DocumentEmbedder
from ..evaluation import comparison  # noqa: F401 (what only a whole run imports)
from ..evaluation.evaluate import evaluate
from ..models import feature_map_fitting
from ..models.configuration import RecurGPT2Config
from ..models.hub import load_tokenizer
from ..models.loading import load_any
from ..models.modeling import RecurGPT2LMHeadModel
from ..models.outputs import CACHE
from ..training.arguments import TrainingArguments
from ..training.loss import SegmentLoss
from ..training.optimizer import make_optimizer
from ..training.trainer import Trainer
from ..utils.allocator import release_memory, tune_allocator
from ..utils.measure import peak_resident, process_bytes, reset_peak
from ..utils.thread_cache import tuned_environment
from .memory_model import Workload

try:
    import resource
except ImportError:  # Windows
    resource = None

# The limit counts what is reserved, used or not: stacks of the threads that a run starts, of eight megabytes each, and
# oneDNN's code, a fraction of a megabyte for each of up to 1,024 products, how much depends on the processor: 60 MiB on
# one that used one of them, and more on another.
RESERVED = 256 * 2**20
LAYER_PRODUCT = 512, 512, 2048
OK, OUT_OF_MEMORY, FAILED = "ok", "out of memory", "failed"
OUT_OF_MEMORY_SIGNS = ("can't allocate memory", "Cannot allocate", "bad_alloc", "MemoryError", "create a primitive")


@dataclass(frozen=True)
class Job:
    """One measurement."""

    model: str
    """Folder or hub id of a GPT-2, or of one of our models."""
    workload: Workload
    window: int = 256
    recurrence: str = "none"
    """For a GPT-2."""
    options: dict = field(default_factory=dict)
    """For a GPT-2: other fields of RecurGPT2Config."""
    protocol: str = "disjoint"
    """score: as `evaluate` takes it."""
    steps: int = 4
    """train: optimizer steps, the first of them to warm up."""
    length: int = 0
    """Tokens of each lane's document; 0: a few blocks."""
    device: str = "cpu"
    budget: int | None = None
    """Bytes above what the libraries take; None: no limit."""


def measured(job: Job) -> dict:
    """Run a job in a fresh process.

    Returns:
        {"status": "ok", "peak_memory_bytes", "tokens_per_second"}, or {"status", "reason"} with "out of memory" or
        "failed" as the status.
    """
    command = [sys.executable, "-m", "recur_gpt2.budget.worker", json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True, env=tuned_environment())
    if done.returncode == 0:
        return held(json.loads(done.stdout.splitlines()[-1]), job.budget)
    said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    starved = done.returncode in (-signal.SIGKILL, -signal.SIGABRT, -signal.SIGSEGV, 137, 134)
    if starved or any(sign in done.stderr for sign in OUT_OF_MEMORY_SIGNS):
        return {"status": OUT_OF_MEMORY, "reason": f"needed more than {_amount(job.budget)}"}
    return {"status": FAILED, "reason": said}


def held(found: dict, budget: int | None) -> dict:
    """What was measured, held to a budget: the system's limit leaves room for more."""
    if budget is None or found["peak_memory_bytes"] <= budget:
        return found
    return {"status": OUT_OF_MEMORY, "reason": f"took {_amount(found['peak_memory_bytes'])}"}


def _amount(budget):
    return "the machine has" if budget is None else f"{budget / 2**20:,.0f} MiB"


def limit_memory(budget: int | None) -> int:
    """Warm up, and let the system refuse this process more than `budget` bytes in use from now on, beside what is only
    reserved (Linux; None: no limit).

    Returns:
        Resident bytes now: what the interpreter and the libraries take.
    """
    _warm_up()
    gc.collect()
    release_memory()
    base = reset_peak() or peak_resident()
    if budget is not None:
        limit = process_bytes("VmData") + budget + RESERVED
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    tune_allocator()
    return base


def _warm_up():
    """Load what the libraries load when they are first used, with a model of a few kilobytes.

    And MKL's buffers, which each thread keeps from its first products on: 10 MB on some processors for a product of a
    layer's size, which the formulas, fitted on others, do not know.
    """
    torch.ones(LAYER_PRODUCT[:2]).mm(torch.ones(LAYER_PRODUCT[1:]))

    config = RecurGPT2Config(
        n_layer=1, n_embd=32, n_head=2, vocab_size=300, window=32, last_slots=4, bos_token_id=0, eos_token_id=0
    )
    model = RecurGPT2LMHeadModel(config).train()
    ids, starts = torch.zeros(2, 2, 32, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.bool)
    segment = Segment(ids, ids, starts, starts.long(), starts.long())
    for precision in (None, torch.bfloat16):
        args = TrainingArguments(checkpointing=precision is None)
        optimizer = make_optimizer(model, args)
        with torch.autocast("cpu", precision, enabled=precision is not None):
            total, _ = SegmentLoss(model, args)(segment, None)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


class RandomCorpus:
    """Endless documents of random tokens, as training asks for them."""

    fingerprint, num_documents, titles = "random", 1024, None

    def __init__(self, vocabulary: int, length: int):
        self.vocabulary, self.length = vocabulary, length

    def documents(self, seed: int | None = None, epoch: int = 0, skip: int = 0) -> Iterator[np.ndarray]:
        for number in range(skip, self.num_documents):
            yield np.random.default_rng(number).integers(self.vocabulary, size=self.length)


def _measure(job: Job) -> dict:
    base = limit_memory(job.budget)
    feature_map_fitting.FIT_STEPS = feature_map_fitting.DISTIL_STEPS = 1  # as high a peak as all of them
    model = load_any(job.model, job.window, job.recurrence, **job.options).to(job.device)
    if job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    loading = peak_resident()  # evaluation counts its own peak from its beginning on
    speed = {"train": _train, "score": _score, "embed": _embed, "generate": _generate}[job.workload.task](model, job)
    peak = torch.cuda.max_memory_allocated() if job.device == "cuda" else max(loading, peak_resident()) - base
    return {"status": OK, "peak_memory_bytes": peak, "tokens_per_second": speed}


def _train(model, job):
    work = job.workload
    args = TrainingArguments(
        steps=job.steps,
        lanes=work.lanes,
        bptt=work.windows,
        accumulate=work.accumulate,
        checkpointing=work.checkpointing,
        precision=work.precision,
        recurrent=model.config.is_recurrent,
    )
    corpus = RandomCorpus(model.config.vocab_size, job.length or 64 * job.window + 1)
    with tempfile.TemporaryDirectory() as folder:
        history = Trainer(model, corpus, args, Path(folder), device=job.device).run()
    speeds = sorted(row["tokens_per_second"] for row in history[1:])
    return speeds[len(speeds) // 2]


def _score(model, job):
    length = job.length or 4 * job.workload.windows * job.window + 1
    documents = list(_random_documents(model, job.workload.lanes, length))
    scored = evaluate(
        model,
        documents,
        load_tokenizer(job.model),
        protocol=job.protocol,
        lanes=job.workload.lanes,
        parallel_windows=job.workload.windows,
        dtype=_dtype(job),
    )
    return (sum(map(len, documents)) - len(documents)) / scored.seconds


def _embed(model, job):
    tokenizer = load_tokenizer(job.model)
    length = job.length or 4 * job.workload.windows * job.window
    texts = [tokenizer.decode(ids) for ids in _random_documents(model, job.workload.lanes, length)]
    embedder = DocumentEmbedder(model, tokenizer)
    began = time.perf_counter()
    with torch.autocast(job.device, _dtype(job), enabled=_dtype(job) is not None):
        embedder.encode(texts, batch_tokens=job.workload.lanes * job.workload.windows * job.window)
    return job.workload.lanes * length / (time.perf_counter() - began)


@torch.no_grad()
def _generate(model, job):
    """A prompt of some windows read, then text written after it, in every lane. Weights in 16 bit, if it is that."""
    model = model.to(_dtype(job) or torch.float32)
    prompt = torch.zeros(job.workload.lanes, job.workload.windows * job.window, dtype=torch.int64, device=job.device)
    new = max(2, job.length or 2 * job.window)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": model.config.vocab_size - 1}
    state = model(prompt, use_cache=True, logits_to_keep=1)[CACHE].state()
    began = time.perf_counter()
    model.generate(prompt[:, -1:], state=state, max_new_tokens=new, **options)
    return job.workload.lanes * new / (time.perf_counter() - began)


def _random_documents(model, count, length):
    return RandomCorpus(model.config.vocab_size, length).documents(skip=RandomCorpus.num_documents - count)


def _dtype(job):
    return torch.bfloat16 if job.workload.precision == "bfloat16" else None


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    print(json.dumps(_measure(Job(**settings | {"workload": Workload(**settings["workload"])}))))
