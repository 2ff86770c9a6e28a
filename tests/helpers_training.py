"""What the tests of windows, training, checkpoints, precision, evaluation and accounting share: small models, documents
and references. Run as a program, it is a small finetuning run in a process of its own, to be killed.

    python helpers_training.py FOLDER kill      killed by SIGKILL with a checkpoint half written
    python helpers_training.py FOLDER wait      stands still in a step until SIGINT or SIGTERM reaches it
"""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from recur_gpt2 import RecurGPT2Config, RecurGPT2LMHeadModel
from recur_gpt2.data.batches import TrainingLanes
from recur_gpt2.data.corpora import Corpus
from recur_gpt2.training.arguments import TrainingArguments
from recur_gpt2.training.trainer import Trainer
from recur_gpt2.utils.tensors import IGNORE_INDEX

WINDOW, VOCABULARY = 8, 97
SHAPE = {
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 4,
    "vocab_size": VOCABULARY,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
RECURRENCES = {
    "last": {"recurrence": "default", "last_slots": 3},
    "pooled": {"recurrence": "default", "last_slots": 2, "pooled_slots": 2, "insert_layers": [1]},
    "yoshida2020": {"recurrence": "yoshida2020", "recurrence_width": 16, "insert_layers": [0]},
}


class SmallCorpus(Corpus):
    """Documents in memory; with `streamed`, one that does not know how many it has."""

    def __init__(self, documents, *, streamed=False, fingerprint="small"):
        self.contents = [np.asarray(tokens, np.int64) for tokens in documents]
        self.num_documents = None if streamed else len(self.contents)
        self.fingerprint = fingerprint

    def documents(self, seed=None, epoch=0, skip=0):
        order = np.arange(len(self.contents))
        if seed is not None:
            np.random.default_rng((seed, epoch)).shuffle(order)
        for index in order[skip:]:
            yield self.contents[index]


class WordTokenizer:
    """Every id is a word of its own, two bytes or more, behind a space."""

    def decode(self, tokens):
        return "".join(f" w{'é' * (int(token) % 3)}{int(token)}" for token in tokens)


def tiny_model(kind="last", *, seed=0, dropout=0.0, memory_std=0.5, **options):
    """A random model whose logits differ from token to token, and to which its memory matters."""
    torch.manual_seed(seed)
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    fields = SHAPE | {"window": WINDOW, "initializer_range": 0.2} | rates | RECURRENCES[kind] | options
    model = RecurGPT2LMHeadModel(RecurGPT2Config(**fields))
    with torch.no_grad():
        for parameter in model.transformer.recurrence.parameters():
            parameter.add_(torch.randn_like(parameter) * memory_std)
    return model.eval()


def gpt2_of(model):
    """transformers' own model with the same weights."""
    fields = {key: value for key, value in model.config.to_dict().items() if key in SHAPE or key.endswith("_pdrop")}
    reference = GPT2LMHeadModel(GPT2Config(**fields)).to(next(model.parameters()).dtype)
    missing, _ = reference.load_state_dict(
        {name: weight for name, weight in model.state_dict().items() if "recurrence" not in name}, strict=False
    )
    assert not missing
    return reference.eval()


def random_documents(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, VOCABULARY, length) for length in lengths]


def repetitive_documents(count=6, length=50):
    """Documents that count round in circles: easy to learn."""
    return [(np.arange(length) * 3 + start) % 12 + 1 for start in range(count)]


def small_run(model, folder, *, corpus=None, **args):
    """A trainer with small settings."""
    corpus = corpus or SmallCorpus(random_documents((50, 9, 23, 70, 41, 30)))
    settings = {"steps": 6, "lanes": 3, "bptt": 2, "save_every": 2, "precision": "float32"} | args
    return Trainer(model, corpus, TrainingArguments(**settings), Path(folder), device="cpu")


def losses_of(history):
    return [row["loss"] for row in history]


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_weights(model, other):
    """To the last bit."""
    left, right = weights_of(model), weights_of(other)
    differing = [name for name in left if not torch.equal(left[name], right[name])]
    assert not differing


def plain_run(model, corpus, args, *, processes=1):
    """Training written down plainly, window by window, with AdamW over named groups; the lanes of several processes
    are walked one after another."""
    shares = [(index, processes) for index in range(processes)]
    walks = [TrainingLanes(corpus, lanes=args.lanes, window=WINDOW, seed=args.seed, share=share) for share in shares]
    states = [None] * processes
    new = [p for name, p in model.named_parameters() if "recurrence" in name]
    old = [p for name, p in model.named_parameters() if "recurrence" not in name]
    groups = [
        {"params": [p for p in old if p.ndim > 1], "lr": args.lr, "weight_decay": args.weight_decay},
        {"params": [p for p in old if p.ndim < 2], "lr": args.lr, "weight_decay": 0.0},
        {"params": new, "lr": args.recurrence_lr, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=False)
    peaks = [group["lr"] for group in optimizer.param_groups]
    warmup = round(args.warmup * args.steps)
    losses = []
    for step in range(1, args.steps + 1):
        rate = step / warmup if step <= warmup else (args.steps - step + 1) / (args.steps - warmup)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rate
        optimizer.zero_grad()
        nats = count = 0
        for _ in range(args.accumulate):
            total = scored = 0
            for index, walk in enumerate(walks):
                segment = walk.segment(args.bptt)
                state = None if states[index] is None else states[index].detach()
                for k in range(args.bptt):
                    window = slice(k, k + 1)
                    starts = segment.starts[:, window]
                    starts = starts if args.recurrent else torch.ones_like(starts)
                    targets = segment.targets[:, window]
                    ids = segment.input_ids[:, window]
                    hidden, shares, state = model.read_windows(ids, targets, starts, state)
                    own = model.lm_head(hidden).softmax(dim=-1).gather(-1, targets.clamp_min(0)[..., None])[..., 0]
                    log_model, pointed = (own.new_zeros(()),) * 2 if shares is None else shares
                    nats_each = -(log_model.exp() * own + pointed).log()
                    total = total + nats_each[targets != IGNORE_INDEX].sum()
                states[index] = state
                scored += int((segment.targets != IGNORE_INDEX).sum())
            (total / scored / args.accumulate).backward()
            nats, count = nats + total.item(), count + scored
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        losses.append(nats / count)
    return losses


def dropout_run(folder):
    """The run that the processes below make: dropout and accumulation, so that every kind of state counts."""
    return small_run(tiny_model(dropout=0.1), folder, accumulate=2, steps=6, save_every=2)


# ---- as a program ----------------------------------------------------------------------------------------------------


def die_in_checkpoint(*, step, file):
    """Write half of a checkpoint's file, then be killed."""
    from recur_gpt2.training import checkpoints

    save_file = checkpoints.save_file

    def save_half(tensors, path, **options):
        save_file(tensors, path, **options)
        if f"step-{step:08d}" in str(path) and Path(path).name == file:
            os.truncate(path, Path(path).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints.save_file = save_half


def wait_in_step(trainer, *, step):
    """Stand still in a step, after saying so, until a signal has been noticed."""
    whole_step = trainer._step

    def slow_step(*args):
        result = whole_step(*args)
        if len(trainer.history) + 1 == step:
            print("waiting", flush=True)
            patience = time.monotonic() + 60
            while not trainer._stop and time.monotonic() < patience:
                time.sleep(0.01)
        return result

    trainer._step = slow_step


if __name__ == "__main__":
    trainer = dropout_run(sys.argv[1])
    if sys.argv[2] == "kill":
        die_in_checkpoint(step=4, file="optimizer.safetensors")
    else:
        wait_in_step(trainer, step=3)
    trainer.run()
