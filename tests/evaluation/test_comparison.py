"""comparison.py: one model is held at a time, and what is scored is what was finetuned."""

import gc
import shutil
import weakref
from copy import deepcopy
from itertools import groupby
from pathlib import Path

import pytest
import torch
from conftest import DATA, random_gpt2
from helpers_training import losses_of, weights_of
from transformers import GPT2LMHeadModel

from recur_gpt2 import RecurGPT2LMHeadModel
from recur_gpt2.evaluation import comparison
from recur_gpt2.evaluation.arguments import ComparisonArguments
from recur_gpt2.evaluation.comparison import run_comparison
from recur_gpt2.evaluation.evaluate import evaluate
from recur_gpt2.evaluation.protocols import ROWS
from recur_gpt2.training.arguments import TrainingArguments
from recur_gpt2.training.trainer import Trainer

MINI = DATA / "gpt2-mini"
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "my", "dog", "that", "came", "by", "today"]


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """The hundreds of thousands of objects that the imports made are not gone through for each row that is scored."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of short documents, four to train on and two to score, tokenised once."""
    folder = tmp_path_factory.mktemp("texts")
    for number, split in enumerate(["train"] * 4 + ["test"] * 2):
        (folder / split).mkdir(exist_ok=True)
        text = " ".join(WORDS[(number + 3 * n * n + n) % len(WORDS)] for n in range(60 + 20 * number))
        (folder / split / f"{number}.txt").write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{kind: folder}: a random GPT-2 with the bundled tokenizer, and a recurrent model that was made from it."""
    folders = {kind: tmp_path_factory.mktemp("models") / kind for kind in ("gpt2", "ours")}
    random_gpt2(n_layer=2, vocab_size=8192).save_pretrained(folders["gpt2"])
    RecurGPT2LMHeadModel.from_gpt2(folders["gpt2"], window=16, last_slots=4).save_pretrained(folders["ours"])
    for folder in folders.values():
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(MINI / name, folder)
    return {kind: str(folder) for kind, folder in folders.items()}


@pytest.fixture
def arguments(models, data, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "write_report", lambda *_: None)  # its plots take most of the time

    def make(kind="gpt2", *, precision="float32", **options):
        small = {"steps": 3, "lanes": 2, "bptt": 2, "save_every": 1, "lr": 1e-2, "precision": precision}
        return ComparisonArguments(
            model=models[kind],
            data=data,
            window=16,
            device="cpu",
            model_options={"last_slots": 4},
            training=TrainingArguments(**small),
            **{"output_dir": tmp_path / "out"} | options,
        )

    return make


def before(monkeypatch, owner, name, look):
    """Call `look` with the arguments of each call, before it."""
    whole = getattr(owner, name)

    def looked_at(*args, **options):
        look(*args)
        return whole(*args, **options)

    monkeypatch.setattr(owner, name, looked_at)


class Held:
    """Which models and optimizers are alive in each event: True for a model, False for an optimizer."""

    def __init__(self, monkeypatch):
        self.made, self.events = [], []
        for kind in (RecurGPT2LMHeadModel, GPT2LMHeadModel, torch.optim.AdamW):
            before(monkeypatch, kind, "__init__", lambda it, *_: self.made.append(weakref.ref(it)))
        before(monkeypatch, comparison, "autocast_dtype", lambda *_: self.note("tried"))
        before(monkeypatch, Trainer, "_step", lambda trainer, *_: self.note(f"finetuned, {trainer.folder.name}"))
        before(monkeypatch, comparison, "evaluate", lambda *_: self.note("scored"))
        before(monkeypatch, comparison, "release_memory", lambda *_: self.note("given back"))

    def note(self, event):
        alive = [it for made in self.made if (it := made()) is not None]
        self.events.append((event, [isinstance(it, torch.nn.Module) for it in alive]))


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "ours"])
def test_one_model_is_held_at_a_time(kind, arguments, monkeypatch):
    """When precision is tried, in each step of finetuning, when each row is scored; and none in between, where memory
    is given back. So too the optimizer."""
    gc.collect()
    held = Held(monkeypatch)
    run_comparison(arguments(kind, precision="auto"))
    one, none, with_optimizer = [True], [], [True, False]
    given_back = ("given back", none)
    assert [event for event, _ in groupby(held.events)] == [
        ("tried", one),
        given_back,
        ("finetuned, recurrent", with_optimizer),
        given_back,
        ("finetuned, disjoint", with_optimizer),
        given_back,
        *[("scored", one), given_back] * 3,
    ]


def test_nothing_is_tried_where_the_precision_is_given(arguments, monkeypatch):
    held = Held(monkeypatch)
    run_comparison(arguments(control=False, rows=["recurrent"]))
    assert "tried" not in dict(held.events)
    assert len(held.made) == 4, "the GPT-2, the model made from it, the optimizer, the finetuned model"


@pytest.mark.parametrize(
    ("options", "loaded"),
    [
        ({"rows": ["base_disjoint"]}, ["gpt2"]),
        ({"rows": ["recurrent", "recurrent_zeroed"]}, ["recurrent"]),
        ({"rows": ["finetuned_overlap", "base_overlap"]}, ["gpt2", "disjoint"]),
        ({"control": False}, ["gpt2", "recurrent"]),
    ],
    ids=["base", "recurrent", "two", "no control"],
)
def test_a_model_that_no_row_is_wanted_of_is_not_loaded(options, loaded, arguments, monkeypatch):
    args, found = arguments(**options), []
    before(monkeypatch, comparison, "_evaluate_all", lambda *_: found.clear())
    before(monkeypatch, comparison, "load_any", lambda folder, *_: found.append(Path(folder)))
    results = run_comparison(args)
    assert [(folder.parent if folder.name == "model" else folder).name for folder in found] == loaded
    assert {row["name"] for row in results["rows"]} <= set(options.get("rows", ROWS))


# ---- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "ours"])
def test_the_control_starts_as_the_gpt2_itself(kind, models, arguments, monkeypatch):
    """To the last bit, whatever was finetuned before it."""
    started = {}
    before(monkeypatch, Trainer, "run", lambda it: started.update({it.folder.name: weights_of(it.model)}))
    run_comparison(arguments(kind, rows=["recurrent"]))
    gpt2 = weights_of(GPT2LMHeadModel.from_pretrained(models["gpt2"]))
    assert started["disjoint"].keys() == gpt2.keys()
    assert started["recurrent"].keys() > gpt2.keys()
    assert all(torch.equal(started["disjoint"][name], weight) for name, weight in gpt2.items())


@pytest.mark.parametrize("kind", ["gpt2", "ours"])
def test_rows_are_those_of_the_models_that_were_finetuned(kind, models, arguments, monkeypatch):
    """Each model is scored as it was in memory when its finetuning ended, and the base as transformers loads it."""
    args, kept, scored = arguments(kind), {}, []
    before(monkeypatch, comparison, "save_model", lambda it, _, folder: kept.update({folder.parent.name: deepcopy(it)}))
    before(
        monkeypatch, comparison, "_evaluate_all", lambda _, documents, tokenizer: scored.extend((documents, tokenizer))
    )
    rows = {row["name"]: row for row in run_comparison(args)["rows"]}
    base = RecurGPT2LMHeadModel.from_gpt2(models["gpt2"], window=16, recurrence="none")
    held = {"base": base, "finetuned": kept["disjoint"], "recurrent": kept["recurrent"]}
    assert sorted(rows) == sorted(ROWS)
    for name, row in rows.items():
        wanted = evaluate(held[ROWS[name].model], *scored, protocol=ROWS[name].protocol.name, lanes=args.training.lanes)
        assert row["nats"] == wanted.nats, name
    assert len({row["nats"] for row in rows.values()}) == len(rows), "each of its own"


def kill(trainer):
    raise RuntimeError("killed")


def interrupt(trainer):
    trainer._stop = True


@pytest.mark.parametrize("name", ["recurrent", "disjoint"])
@pytest.mark.parametrize(("stop", "error"), [(kill, RuntimeError), (interrupt, KeyboardInterrupt)])
def test_a_run_stopped_in_a_finetuning_resumes_to_the_same_end(name, stop, error, arguments, tmp_path, monkeypatch):
    whole = run_comparison(arguments(output_dir=tmp_path / "whole"))

    def disturb(trainer, *_):
        if trainer.folder.name == name and len(trainer.history) == 1:
            stop(trainer)

    with monkeypatch.context() as patch:
        before(patch, Trainer, "_step", disturb)
        with pytest.raises(error):
            run_comparison(arguments())
    assert not (tmp_path / "out" / name / "model").exists()
    resumed = run_comparison(arguments(resume=True))
    assert [row["nats"] for row in resumed["rows"]] == [row["nats"] for row in whole["rows"]]
    for each in ("recurrent", "disjoint"):
        assert losses_of(resumed["training"][each]) == losses_of(whole["training"][each])
        files = [tmp_path / folder / each / "model" / "model.safetensors" for folder in ("whole", "out")]
        assert files[0].read_bytes() == files[1].read_bytes()
