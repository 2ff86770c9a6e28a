"""memory.py: what the formulas predict is what fresh processes take, and its parts are what they are called."""

import re
import sys
from dataclasses import replace

import pytest
from conftest import DATA
from transformers import GPT2Config, GPT2LMHeadModel

from recur_gpt2 import RecurGPT2Config, RecurGPT2LMHeadModel
from recur_gpt2.budget.memory_model import Workload, memory_use, parameter_count
from recur_gpt2.budget.worker import OUT_OF_MEMORY, Job, measured
from recur_gpt2.errors import InputError

BUNDLED = DATA / "gpt2-mini"
MINI = {"n_layer": 6, "n_embd": 256, "n_head": 4, "vocab_size": 8192, "bos_token_id": 0, "eos_token_id": 0}
LARGE = MINI | {
    "n_layer": 4,
    "n_embd": 512,
    "n_head": 8,
    "vocab_size": 8192,
    "resid_pdrop": 0,
    "embd_pdrop": 0,
    "attn_pdrop": 0,
}
# name -> (window, recurrence, workload, fields of the configuration)
TRAINING = {
    "many short windows": (64, "default", Workload("train", 8, 2, False, "float32"), {}),
    "no memory": (256, "none", Workload("train", 2, 2, False, "float32"), {}),
    "long windows": (1024, "default", Workload("train", 1, 1, False, "bfloat16"), {}),
    "recomputation": (256, "default", Workload("train", 2, 8, True, "bfloat16"), {}),
    "several segments": (256, "default", Workload("train", 1, 4, False, "float32", accumulate=2), {}),
    "several, 16 bit": (128, "default", Workload("train", 4, 4, False, "bfloat16", accumulate=2), {}),
    "several, recomputed": (1024, "default", Workload("train", 1, 2, True, "bfloat16", accumulate=2), {}),
    "t2r": (256, "none", Workload("train", 2, 2, False, "float32"), {"linear_layers": "all"}),
    "near": (256, "default", Workload("train", 1, 2, False, "float32"), {"linear_layers": "all", "near_tokens": 64}),
}
READING = {
    "score": (256, "default", Workload("score", 1, 1), {}),
    "score, 16 bit": (256, "default", Workload("score", 2, 2, False, "bfloat16"), {}),
    "score, short windows": (64, "none", Workload("score", 8, 1), {}),
    "embed": (256, "default", Workload("embed", 2, 1), {}),
}
WRITING = {
    "generate": (256, "default", Workload("generate", 1, 4), {}),
    "generate, 16 bit, many": (64, "none", Workload("generate", 8, 4, False, "bfloat16"), {}),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """GPT-2s of random weights, by their fields."""
    folders = {}

    def make(fields):
        key = str(fields)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("gpt2")
            GPT2LMHeadModel(GPT2Config(**fields)).save_pretrained(folders[key])
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (folders[key] / name).write_bytes((BUNDLED / name).read_bytes())
        return folders[key]

    return make


def predicted_and_measured(folder, fields, window, recurrence, workload, options):
    config = RecurGPT2Config(**fields, window=window, recurrence=recurrence, **options)
    protocol = "recurrent" if recurrence != "none" else "disjoint"
    if options:  # maps that were never fitted, which would take minutes
        RecurGPT2LMHeadModel(config).save_pretrained(folder / "ours")
        folder = folder / "ours"
    found = measured(Job(str(folder), workload, window, recurrence, protocol=protocol, steps=2))
    assert found["status"] == "ok", found
    return memory_use(config, workload).total, found["peak_memory_bytes"]


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak since a moment")


@linux_only
@pytest.mark.slow
@pytest.mark.parametrize("case", TRAINING.values(), ids=TRAINING.keys())
def test_finetuning_takes_what_the_formula_says(checkpoint, case):
    predicted, peak = predicted_and_measured(checkpoint(LARGE), LARGE, *case)
    assert predicted == pytest.approx(peak, rel=0.1)


@linux_only
@pytest.mark.slow
@pytest.mark.parametrize("case", READING.values(), ids=READING.keys())
def test_reading_takes_what_the_formula_says(checkpoint, case):
    predicted, peak = predicted_and_measured(checkpoint(LARGE), LARGE, *case)
    assert predicted == pytest.approx(peak, rel=0.1)


@linux_only
@pytest.mark.slow
@pytest.mark.parametrize("case", WRITING.values(), ids=WRITING.keys())
def test_writing_takes_about_what_the_formula_says(checkpoint, case):
    """Less exactly: which of loading, casting, reading the prompt and writing is the highest is close, and differs."""
    predicted, peak = predicted_and_measured(checkpoint(LARGE), LARGE, *case)
    assert predicted == pytest.approx(peak, rel=0.2)


@linux_only
@pytest.mark.slow
def test_conversion_to_linear_attention_takes_no_more_than_finetuning(checkpoint):
    """Maps are fitted before training starts, in the same process (few steps here: as high a peak as all of them)."""
    options, workload = {"linear_layers": "all"}, Workload("train", 1, 2, True, "bfloat16")
    config = RecurGPT2Config(**LARGE, window=512, recurrence="none", **options)
    found = measured(Job(str(checkpoint(LARGE)), workload, 512, "none", options, steps=2))
    assert found["peak_memory_bytes"] == pytest.approx(memory_use(config, workload).total, rel=0.1)


@linux_only
@pytest.mark.slow
def test_running_out_of_a_budget_is_a_result():
    """Of the system's limit, which leaves room for what is reserved only; and of the budget, where that has room."""
    job = Job(str(BUNDLED), Workload("train", 8, 4, False, "float32"), recurrence="default", steps=1)
    refused = measured(replace(job, budget=50 * 2**20))
    assert refused == {"status": OUT_OF_MEMORY, "reason": "needed more than 50 MiB"}
    job = replace(job, workload=Workload("score", 1, 1), protocol="recurrent")
    slipped = measured(replace(job, budget=30 * 2**20))
    assert slipped["status"] == OUT_OF_MEMORY
    assert 30 < int(re.fullmatch(r"took (\d+) MiB", slipped["reason"])[1]) < 150


def test_parameters_are_counted_as_they_are():
    for options in ({}, {"recurrence": "yoshida2020"}, {"recurrence": "none", "linear_layers": [1, 2]}):
        config = RecurGPT2Config(**MINI, **options)
        model = RecurGPT2LMHeadModel(config)
        assert parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())


def test_weights_gradients_and_optimizer_are_sixteen_bytes_a_parameter():
    config = RecurGPT2Config(**MINI)
    assert memory_use(config, Workload(checkpointing=True)).fixed == 16 * parameter_count(config)


@pytest.mark.parametrize("task", ["score", "embed", "generate"])
def test_reading_takes_no_gradients(task):
    use = memory_use(RecurGPT2Config(**MINI), Workload(task, 1, 1))
    assert use.gradients == use.optimizer == 0


@pytest.mark.parametrize("task", ["train", "score", "embed"])
def test_memory_grows_with_lanes_and_windows_and_shrinks_with_recomputation(task):
    config = RecurGPT2Config(**MINI)
    totals = [memory_use(config, Workload(task, lanes, 4)).total for lanes in (1, 2, 8)]
    assert totals == sorted(totals)
    assert memory_use(config, Workload(task, 8, 8)).total > totals[2]
    if task == "train":
        assert memory_use(config, Workload(task, 8, 4, True)).total < totals[2]


def test_a_document_of_any_length_takes_the_same():
    """Recomputation keeps a few states of a segment, however long it is."""
    config = RecurGPT2Config(**MINI)
    assert memory_use(config, Workload("train", 2, 64, True)) == memory_use(config, Workload("train", 2, 512, True))


@pytest.mark.parametrize("wrong", [{"task": "dream"}, {"lanes": 0}, {"windows": 0}], ids=str)
def test_impossible_workloads_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Workload(**wrong)
