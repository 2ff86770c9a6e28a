"""The comparison that the project exists for: one GPT-2, one window, the same finetuning, with recurrence and without.

`run_comparison` finetunes both, evaluates every protocol and control, and writes the report. run_pg19.py and
`recur-gpt2 finetune` are thin around it. With several processes all of them finetune, and the main one does the rest.

One model is held at a time: each is loaded for its task and let go after it, so that the job's peak memory is that of
its heaviest task, and not of all together.
"""

from __future__ import annotations

import gc
import json
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from importlib.metadata import version

import numpy as np
import torch

from ..data.corpora import load_corpus
from ..errors import InputError
from ..models.adapters import add_lora
from ..models.configuration import RecurGPT2Config, with_window
from ..models.hub import load_config, load_tokenizer
from ..models.loading import load_any, plain_copy, save_model
from ..training.arguments import TrainingArguments
from ..training.distributed import Processes
from ..training.precision import autocast_dtype
from ..training.trainer import Trainer
from ..utils.allocator import release_memory
from ..utils.device import checked_device
from ..utils.files import atomic_write_text, clear_unfinished, settings_file
from .arguments import PARALLEL_WINDOWS, ComparisonArguments
from .evaluate import Evaluation, evaluate, gap_covered_interval
from .horizons import measure_horizons
from .protocols import ROWS, obstacle
from .report import gap_covered, write_report
from .scoring import by_document, evaluation_documents

FINETUNED = {"recurrent": "recurrent", "finetuned": "disjoint"}  # how its rows' names begin: a model's folder
PACKAGES = ("recur-gpt2", "torch", "transformers", "datasets", "accelerate", "tokenizers")


def run_comparison(args: ComparisonArguments) -> dict | None:
    """Finetune, evaluate, report. Returns what results.json holds; None in all processes but the main one.

    Raises:
        InputError: bad input of any kind; nothing that an earlier run wrote is lost.
        KeyboardInterrupt: after Ctrl-C, with a checkpoint written.
    """
    args.device = checked_device(args.device)
    processes = Processes(args.device)
    with processes.main_first():  # it tokenises for all
        recurrent = _check_model(args)
        if processes.is_main:
            settings_file(args.output_dir, "run", resume=args.resume)
        tokenizer = load_tokenizer(args.model)
        train = load_corpus(args.data, "train", tokenizer)
        if processes.is_main:
            documents = evaluation_documents(
                load_corpus(args.data, args.eval_split, tokenizer), args.eval_tokens or None
            )
            _check_rows(args, recurrent, len(documents))
            if train.split_rule:
                print(train.split_rule, file=sys.stderr)
    if args.training.precision == "auto":
        args.training.precision = _measured_precision(args, processes)

    # Both before any evaluation: the other processes need not wait for it, they are done.
    names = ("recurrent", "disjoint") if args.control else ("recurrent",)
    training = {name: _finetune(args, name, train, tokenizer, processes) for name in names}
    processes.leave()
    if not processes.is_main:
        return None
    evaluations = _evaluate_all(args, documents, tokenizer)
    results = _results(args, evaluations, training, processes)
    if args.horizons:
        results["horizons"] = _horizons(args, documents, evaluations["recurrent"])
    write_report(results, args.output_dir)
    return results


def _alone(task: Callable) -> Callable:
    """A task that loads a model of its own: when it is done the memory is given back, for the next one's model."""

    @wraps(task)
    def run(*args):
        result = task(*args)
        gc.collect()
        release_memory()
        return result

    return run


def _check_model(args):
    """Refuse options that this model cannot have, before anything that takes long. -> whether it will be recurrent"""
    config = load_config(args.model)
    if config.model_type == RecurGPT2Config.model_type:
        _check_ours(args, config)
    elif config.model_type == "gpt2":
        config = with_window(config, args.window, recurrence=args.recurrence, **args.model_options)
    return getattr(config, "is_recurrent", False)  # of another architecture: loading it says what is wrong


def _check_rows(args, recurrent, documents):
    """Refuse rows that were asked for and cannot be had."""
    if args.horizons and not (recurrent and (args.rows is None or "recurrent" in args.rows)):
        way_out = "add it to --rows" if recurrent else "give a recurrence"
        raise InputError(f"horizons={args.horizons} need the row 'recurrent' beside them; {way_out}")
    for row in args.rows or ():
        if ROWS[row].model == "finetuned" and not args.control:
            raise InputError(f"row {row!r} is of the finetuned GPT-2, which --no-control leaves out; leave out one")
        why = _obstacle(row, recurrent, documents)
        if why:
            raise InputError(f"row {row!r} {why}, or leave it out")


def _check_ours(args, config):
    """A model of ours is what it is: options may only repeat it."""
    wanted = RecurGPT2Config(**config.to_dict() | args.model_options)  # which makes lists of names of sets of layers
    options = args.model_options.items()
    differing = {key: value for key, value in options if getattr(config, key) != getattr(wanted, key)}
    if args.recurrence != ComparisonArguments.recurrence and args.recurrence != config.recurrence:
        differing["recurrence"] = args.recurrence
    if differing:
        key, value = next(iter(differing.items()))
        raise InputError(
            f"{args.model} was made with {key}={getattr(config, key)!r}, not {value!r}; leave that option out, or "
            f"start from a GPT-2"
        )


def _load(args):
    """The model to finetune: a GPT-2 with what the arguments add to it, or one of ours as it is."""
    return load_any(args.model, args.window, args.recurrence, **args.model_options)


def _load_plain(args):
    """The GPT-2 that it is compared to."""
    return plain_copy(load_any(args.model, args.window))


def _settings(args):
    settings = asdict(args) | {"output_dir": str(args.output_dir)}
    return settings | {"command": shlex.join(["python", *sys.argv] if sys.argv[0].endswith(".py") else sys.argv)}


@_alone
def _measured_precision(args, processes):
    """What all compute in: as the main process measures."""
    with processes.main_first():
        model = _load_plain(args).to(processes.device)
    dtype = autocast_dtype(model, "auto", training=True)
    return "bfloat16" if processes.any(processes.is_main and dtype is not None) else "float32"


@_alone
def _finetune(args, name, corpus, tokenizer, processes):
    """Load the recurrent model or the disjoint control, finetune and save it. -> a row for each step"""
    folder, options = args.output_dir / name, {"recurrent": True}
    if name == "disjoint":
        options = {"recurrent": False, "transfer_steps": 0, "new_first_steps": 0}
    with processes.main_first():  # it downloads for all
        model = _load(args) if name == "recurrent" else _load_plain(args)
    settings = TrainingArguments(**asdict(args.training) | options)
    saved = model if settings.lora_rank is None else add_lora(model, settings.lora_rank, args.model)
    trainer = Trainer(model, corpus, settings, folder, device=args.device)
    with processes.agreeing():
        trainer.checkpoints.check(resume=args.resume)
        if processes.is_main:  # not before: a run that is refused changes nothing
            atomic_write_text(args.output_dir / "settings.json", json.dumps(_settings(args), indent=1) + "\n")
            clear_unfinished(folder, "model")
    history = trainer.run(resume=args.resume, description=f"finetuning, {name}")
    model.cpu()
    with processes.agreeing():
        if processes.is_main:
            save_model(saved, tokenizer, _saved(args, name))
    return history


def _saved(args, name):
    """Where a finetuned model lies."""
    return args.output_dir / name / "model"


def _evaluate_all(args, documents, tokenizer) -> dict[str, Evaluation]:
    """{row name: evaluation}, one model after another; one that no row is wanted of is not loaded."""
    evaluations = {}
    for name in ("base", "recurrent", "finetuned") if args.control else ("base", "recurrent"):
        rows = _rows_of(args, name, documents)
        if rows:
            evaluations |= _evaluate_rows(args, name, rows, documents, tokenizer)
    return evaluations


def _rows_of(args, name, documents):
    """Rows to score of a model: apart, overlapping and, with recurrence, the controls."""
    wanted = [row for row in ROWS if ROWS[row].model == name and (args.rows is None or row in args.rows)]
    recurrent = name == "recurrent" and load_config(_saved(args, name)).is_recurrent
    return [row for row in wanted if not _obstacle(row, recurrent, len(documents))]


@_alone
def _evaluate_rows(args, name, rows, documents, tokenizer):
    """Load a model and score some rows of it."""
    model = load_any(_saved(args, FINETUNED[name])) if name in FINETUNED else _load_plain(args)
    model.to(args.device)
    return {
        row: evaluate(model, documents, tokenizer, protocol=ROWS[row].protocol.name, **_reading(args)) for row in rows
    }


@_alone
def _horizons(args, documents, whole):
    """The rows of the recurrent model's horizons."""
    model = load_any(_saved(args, "recurrent")).to(args.device)
    return measure_horizons(model, documents, whole, args.horizons, **_reading(args)).rows()


def _reading(args):
    """How documents are read to be scored."""
    return {
        "lanes": args.training.lanes,
        "parallel_windows": min(PARALLEL_WINDOWS, args.training.block),  # no more than finetuning had room for
        "dtype": torch.bfloat16 if args.training.precision == "bfloat16" else None,
        "progress": True,
    }


def _results(args, evaluations, training, processes):
    names = [name for name in ROWS if name in evaluations]
    rows = [evaluations[name].row(name, ROWS[name].protocol.reported, args.window) for name in names]
    covered = gap_covered(rows)
    if covered is not None:
        row = next(row for row in rows if row["name"] == "recurrent")
        three = (evaluations[name] for name in ("finetuned_disjoint", "finetuned_overlap", "recurrent"))
        row |= {"gap_covered": covered, "gap_covered_interval": list(gap_covered_interval(*three))}
    positions = {name: [None if np.isnan(x) else float(x) for x in evaluations[name].by_position] for name in names}
    versions = {package: version(package) for package in PACKAGES} | {"python": platform.python_version()}
    return {
        "rows": rows,
        "settings": _settings(args) | {"processes": processes.count},
        "versions": versions,
        "loss_by_position": positions,
        **by_document({name: evaluations[name] for name in names}),
        "training": training,
    }


def _obstacle(row, recurrent, documents):
    """Why a control cannot be scored, or None. Other rows always can: without recurrence they read windows apart."""
    protocol = ROWS[row].protocol
    return obstacle(protocol, recurrent, documents) if protocol.control_of else None
