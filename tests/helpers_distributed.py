"""What test_distributed.py runs in two processes at once, which torchrun starts from here.

    torchrun --nproc-per-node 2 helpers_distributed.py FOLDER

Every scenario trains in FOLDER/<its name>, and returns a model and JSON values to be looked at. Each process leaves
the model's weights and the values there, in <process>.safetensors and <process>.json.
"""

import errno
import json
import math
import os
import signal
import sys
from pathlib import Path

import torch
from helpers_training import (
    RECURRENCES,
    SmallCorpus,
    dropout_run,
    random_documents,
    small_run,
    tiny_model,
    weights_of,
)
from safetensors.torch import save_file

from recur_gpt2.errors import InputError
from recur_gpt2.training import checkpoints
from recur_gpt2.training import trainer as trainer_module
from recur_gpt2.training.distributed import leave

INDEX = int(os.environ.get("RANK", "0"))
WEIGHED = {"steps": 5, "lanes": 2, "lr": 1e-2, "recurrence_lr": 3e-2, "clip": 0.5, "warmup": 0.4, "weight_decay": 0.1}
# The two processes' documents differ in length, so that they score different numbers of tokens.
UNEQUAL = random_documents((50, 4, 63, 9, 41, 3, 30, 12))
PLAIN = {
    **{kind: {"kind": kind} for kind in RECURRENCES},
    "accumulated": {"kind": "pooled", "accumulate": 3},
    "disjoint": {"kind": "last", "recurrent": False},
    "checkpointing": {"kind": "pooled", "checkpointing": True, "bptt": 3},
    "window by window": {"kind": "pooled", "bptt": 1},
}


class InOrder(SmallCorpus):
    """Never shuffled: of two processes, one gets the even documents and the other the odd ones."""

    def documents(self, seed=None, epoch=0, skip=0):
        yield from super().documents(skip=skip)


def plain(folder, *, kind, **settings):
    """A run whose processes begin with different weights: the main one's count."""
    model = tiny_model(kind, seed=INDEX).double()
    history = small_run(model, folder, corpus=InOrder(UNEQUAL), **WEIGHED | settings).run()
    return model, history


def one_without_memory(folder):
    """The second process's documents all fit a window: there nothing has a gradient that memory alone gives."""
    model = tiny_model("pooled").double()
    corpus = InOrder(random_documents((50, 5, 63, 9, 41, 3, 30, 7)))
    history = small_run(model, folder, corpus=corpus, **WEIGHED).run()
    return model, history


def undisturbed(folder):
    trainer = dropout_run(folder)
    return trainer.model, trainer.run()


def outcome(run):
    """What stopped a run: its kind and its words."""
    try:
        run()
    except (InputError, KeyboardInterrupt) as error:
        return [type(error).__name__, str(error)]
    return None


def resumed(folder, first):
    """Resume a run that `first` says was stopped."""
    trainer = dropout_run(folder)
    before = trainer.checkpoints.latest().name
    history = trainer.run(resume=True)
    return trainer.model, {"stopped": first, "latest": before, "history": history}


def before_step(trainer, step, action):
    whole_step = trainer._step

    def disturbed_step(*args):
        if len(trainer.history) + 1 == step and INDEX == 1:
            action(*args)
        return whole_step(*args)

    trainer._step = disturbed_step


def terminated(folder):
    """The second process alone gets a signal."""
    trainer = dropout_run(folder)
    before_step(trainer, 3, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    return resumed(folder, outcome(trainer.run))


def terminated_in_the_last_step(folder):
    trainer = dropout_run(folder)
    before_step(trainer, trainer.args.steps, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    return resumed(folder, outcome(trainer.run))


def diverged(folder):
    """The second process alone meets a loss that is no number."""
    trainer = dropout_run(folder)

    def spoil(loss, *_):
        finite = loss.forward
        loss.forward = lambda *inputs: (finite(*inputs)[0] * math.nan, finite(*inputs)[1])

    before_step(trainer, 4, spoil)
    return resumed(folder, outcome(trainer.run))


def full_disk(folder):
    """Only the main process writes, so it alone notices."""
    trainer = dropout_run(folder)
    save_file = checkpoints.save_file

    def fail(tensors, path, **options):
        if "step-00000004" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path, **options)

    checkpoints.save_file = fail
    first = outcome(trainer.run)
    checkpoints.save_file = save_file
    return resumed(folder, first)


def measured_differently(folder):
    """Which type is faster, each process may find differently."""
    asked = trainer_module.autocast_dtype
    trainer_module.autocast_dtype = lambda *_, **__: torch.bfloat16 if INDEX == 0 else None
    used = []
    trainer = small_run(tiny_model(), folder, steps=1, precision="auto")
    whole_step = trainer._step
    trainer._step = lambda *args: (used.append(str(args[-1])), whole_step(*args))[1]
    trainer.run()
    trainer_module.autocast_dtype = asked
    return trainer.model, used


SCENARIOS = {
    **{name: lambda folder, options=options: plain(folder, **options) for name, options in PLAIN.items()},
    "one without memory": one_without_memory,
    "undisturbed": undisturbed,
    "terminated": terminated,
    "terminated in the last step": terminated_in_the_last_step,
    "diverged": diverged,
    "full disk": full_disk,
    "measured differently": measured_differently,
}


if __name__ == "__main__":
    for name, scenario in SCENARIOS.items():
        folder = Path(sys.argv[1]) / name
        model, result = scenario(folder)
        save_file(weights_of(model), folder / f"{INDEX}.safetensors")
        (folder / f"{INDEX}.json").write_text(json.dumps(result))
    leave()
