"""What the tests share: paths, and tiny models with no parameter at zero or one by accident."""

import os
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

from recur_gpt2 import RecurGPT2LMHeadModel

if "PYTEST_XDIST_WORKER" in os.environ:  # workers that each take all cores are ten times slower
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
WINDOW = 8
GPT2_OPTIONS = {
    "n_layer": 4,
    "n_embd": 32,
    "n_head": 4,
    "vocab_size": 97,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
}
NO_POINTER = {"pointer_slots": 0}
# Both presets, and what else a configuration can say about memory.
FORMS = {
    "default": {"recurrence": "default", "last_slots": 3, "pointer_slots": 2 * WINDOW + 3},
    "sinks only": {"recurrence": "default", "sink_slots": 2, "last_slots": 0} | NO_POINTER,
    "gated": {"recurrence": "default", "sink_slots": 0, "last_slots": 0, "pooled_slots": 2} | NO_POINTER,
    "all slots, some layers": {"last_slots": 2, "pooled_slots": 2, "sink_slots": 2, "insert_layers": [1, 3]}
    | NO_POINTER,
    "whole window": {"last_slots": WINDOW, "pointer_slots": 5},
    "pointer": {"recurrence": "none", "pointer_slots": 4 * WINDOW, "pointer_width": 3},
    "yoshida2020": {"recurrence": "yoshida2020"},
    "pooled above": {"recurrence": "yoshida2020", "pooled_slots": 3, "insert_layers": [0, 2], "pool_layers": [1, 3]},
    "pooled below": {"recurrence": "yoshida2020", "pooled_slots": 2, "insert_layers": [2, 3], "pool_layers": [0, 1]},
    "pooled there": {"recurrence": "yoshida2020", "insert_layers": [1], "pool_layers": [1]},
    "none": {"recurrence": "none"},
}
WITH_MEMORY = [name for name in FORMS if name != "none"]
# Linear attention, alone and with every form of memory.
SMALL = {"feature_size": 6}
LINEAR_FORMS = {
    "t2r": {"recurrence": "none", "linear_layers": "all"} | SMALL,
    "t2r, default": {"last_slots": 3, "linear_layers": "75%"} | SMALL,
    "hedgehog, gated": FORMS["gated"] | {"linear_layers": "all", "feature_map": "hedgehog"} | SMALL,
    "elu, all slots": FORMS["all slots, some layers"] | {"linear_layers": [1, 2], "feature_map": "elu"},
    "rfa, sinks only": FORMS["sinks only"] | {"linear_layers": "all", "feature_map": "rfa"} | SMALL,
    "hedgehog, yoshida2020": FORMS["yoshida2020"] | {"linear_layers": "all", "feature_map": "hedgehog"} | SMALL,
    "t2r, pooled above": FORMS["pooled above"] | {"linear_layers": [0, 2, 3]} | SMALL,
    "near": {"recurrence": "none", "linear_layers": "all", "near_tokens": 3} | SMALL,
    "near, default": {"last_slots": 2, "linear_layers": "75%", "near_tokens": 5} | SMALL,
    "near, whole window": FORMS["whole window"] | {"linear_layers": "all", "near_tokens": WINDOW} | SMALL,
    "near, gated": FORMS["gated"] | {"linear_layers": [0, 3], "feature_map": "hedgehog", "near_tokens": 1} | SMALL,
    "near, pooled above": FORMS["pooled above"] | {"linear_layers": "all", "near_tokens": 2} | SMALL,
    "near, yoshida2020": FORMS["yoshida2020"] | {"linear_layers": "all", "feature_map": "elu", "near_tokens": 4},
    "near, carried": {"last_slots": 3, "linear_layers": "all", "near_tokens": 2, "carry_linear_state": True} | SMALL,
    "carried": {"recurrence": "none", "linear_layers": [0, 2], "carry_linear_state": True} | SMALL,
    "carried, default": {"last_slots": 3, "linear_layers": "all", "carry_linear_state": True} | SMALL,
}
ALL_FORMS = FORMS | LINEAR_FORMS
LINEAR_WITH_MEMORY = [name for name in LINEAR_FORMS if name not in ("t2r", "near")]


def perturb(module, std=0.3, seed=0):
    """Add noise to every parameter, in place. -> the module"""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return module


def random_ids(*shape, seed=0):
    return torch.randint(GPT2_OPTIONS["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def random_gpt2(seed=0, **options):
    """A GPT-2 of random weights, in evaluation mode."""
    torch.manual_seed(seed)
    return perturb(GPT2LMHeadModel(GPT2Config(**GPT2_OPTIONS | options)), std=0.15, seed=seed).eval()


def assert_same_state(state, other, **tolerance):
    """The same counters, and the same numbers wherever a row has memory or an unfinished window."""
    assert state.windows.tolist() == other.windows.tolist()
    assert state.filled.tolist() == other.filled.tolist()
    groups = (
        (state.memory, other.memory, state.windows > 0),
        (state.window, other.window, state.filled > 0),
    )
    for ours, theirs, rows in groups:
        if not rows.any():
            continue
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert_close(tensor[rows], theirs[name][rows], **tolerance)


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory):
    """A random GPT-2 as transformers saves it."""
    folder = tmp_path_factory.mktemp("gpt2")
    random_gpt2().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gpt2(gpt2_folder):
    """transformers' own model of that folder, in float64."""
    return GPT2LMHeadModel.from_pretrained(gpt2_folder).double().eval()


@pytest.fixture(scope="session")
def make_model(gpt2_folder):
    """form, other options -> that GPT-2 with windows and a random recurrence, in float64. Not to be changed: shared."""

    @cache
    def make(form="default", dtype=torch.float64, **options):
        torch.manual_seed(0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "recur_gpt2.models.feature_map_fitting.FIT_STEPS", 50
            )  # how well a map fits matters little here
            patch.setattr("recur_gpt2.models.feature_map_fitting.DISTIL_STEPS", 2)
            model = RecurGPT2LMHeadModel.from_gpt2(gpt2_folder, **{"window": WINDOW} | ALL_FORMS[form] | options)
        perturb(model.transformer.recurrence)
        if model.transformer.recurrence.pointer is not None:  # it begins with next to no share
            model.transformer.recurrence.pointer.log_scale.data += 0.5
        for block in model.transformer.h:
            if block.far_gate is not None:
                perturb(block.far_gate)
            if block.state_decay is not None:
                block.state_decay.data.uniform_(-1, 1)
        return model.to(dtype).eval()

    return make
