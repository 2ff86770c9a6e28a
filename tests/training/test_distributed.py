"""Several processes compute what one would, stop together, write once and resume exactly. On the CPU, over gloo."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import helpers_distributed
import pytest
import torch
from helpers_distributed import PLAIN, UNEQUAL, WEIGHED, InOrder
from helpers_training import dropout_run, losses_of, plain_run, random_documents, tiny_model, weights_of
from safetensors.torch import load_file

from recur_gpt2.cli.process import guarded
from recur_gpt2.errors import InputError
from recur_gpt2.training.arguments import TrainingArguments
from recur_gpt2.training.distributed import ElsewhereError

pytestmark = pytest.mark.slow
COUNT = 2


def launch(*command, **environment):
    """Start a program in two processes, by torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(COUNT)]
    return subprocess.Popen(
        [*launcher, *map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All scenarios, played by two processes."""
    folder = tmp_path_factory.mktemp("scenarios")
    process = launch(helpers_distributed.__file__, folder)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return folder


@pytest.fixture
def played(folder):
    """Scenario -> what each process found: [(weights, values)]."""

    def look(name):
        found = []
        for index in range(COUNT):
            values = json.loads((folder / name / f"{index}.json").read_text())
            found.append((load_file(folder / name / f"{index}.safetensors"), values))
        return found

    return look


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


# ---- what they compute -----------------------------------------------------------------------------------------------


def assert_as_one_process(found, model, corpus, args):
    """Both processes have the weights that a plain loop over the lanes of both ends with."""
    losses = plain_run(model, corpus, args, processes=COUNT)
    wanted = weights_of(model)
    assert_same(found[0][0], found[1][0])
    for name, weight in found[0][0].items():
        torch.testing.assert_close(weight, wanted[name], rtol=1e-6, atol=1e-8, msg=name)
    for _, history in found:
        assert losses_of(history) == pytest.approx(losses, rel=1e-9)


def arguments(**settings):
    return TrainingArguments(**{"bptt": 2} | WEIGHED | settings)


@pytest.mark.parametrize("name", PLAIN)
def test_two_processes_compute_what_one_with_all_their_lanes_would(name, played):
    """Tokens weigh the same wherever they are, though the second process began with other weights."""
    options = {key: value for key, value in PLAIN[name].items() if key != "kind"}
    model = tiny_model(PLAIN[name]["kind"]).double()
    assert_as_one_process(played(name), model, InOrder(UNEQUAL), arguments(**options))


def test_a_gradient_may_be_there_in_one_process_only(played):
    corpus = InOrder(random_documents((50, 5, 63, 9, 41, 3, 30, 7)))
    assert_as_one_process(played("one without memory"), tiny_model("pooled").double(), corpus, arguments())


def test_the_main_process_says_what_to_compute_in(played):
    assert [used for _, used in played("measured differently")] == [["torch.bfloat16"]] * COUNT


# ---- how they stop, and go on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "words", "latest"),
    [
        ("terminated", "KeyboardInterrupt", "stopped after step 3; --resume goes on from there", 3),
        ("terminated in the last step", "KeyboardInterrupt", "stopped after step 6; --resume goes on from there", 6),
        ("diverged", "InputError", "training diverged at step 4 ", 2),
        ("full disk", "InputError", "the checkpoint of step 4 could not be written ", 2),
    ],
)
def test_what_stops_one_process_stops_all_and_they_resume_exactly(name, kind, words, latest, played):
    found, whole = played(name), played("undisturbed")
    stopped = [values["stopped"] for _, values in found]
    assert stopped[0][0] == kind
    assert stopped[0][1].startswith(words)
    if kind == "InputError":  # one process says why
        assert stopped[1] == ["ElsewhereError", "process 0 of 2 cannot go on; its own message says why"]
    else:
        assert stopped[1] == stopped[0]
    for (weights, values), (wanted, history) in zip(found, whole, strict=True):
        assert values["latest"] == f"step-{latest:08d}"
        assert_same(weights, wanted)
        assert losses_of(values["history"]) == losses_of(history)
        assert [row["tokens"] for row in values["history"]] == [row["tokens"] for row in history]


def test_a_run_of_another_number_of_processes_is_refused(folder):
    with pytest.raises(InputError, match="holds a run with processes=2, not 1; resume with its settings or give") as no:
        dropout_run(folder / "undisturbed").run(resume=True)
    assert "\n" not in str(no.value)


def test_files_are_written_once(folder):
    """One log, and checkpoints that one process wrote for both, with nothing unfinished."""
    written = folder / "undisturbed"
    assert len(list((written / "logs").iterdir())) == 1
    assert sorted(path.name for path in (written / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    latest = written / "checkpoints" / "step-00000006"
    assert len(json.loads((latest / "run.json").read_text())["positions"]) == COUNT
    random = load_file(latest / "random.safetensors")["cpu"]
    assert len(random) == COUNT
    assert not torch.equal(*random), "dropout differs between them"


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "my", "dog", "that", "came", "by", "today"]
    for number in range(6):
        text = " ".join(words[(number + 3 * n * n + n) % len(words)] for n in range(60 + 20 * number))
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder


def test_what_another_process_refuses_is_not_said_again(capsys):
    def refuse():
        raise ElsewhereError("process 0 of 2 cannot go on")

    assert guarded(refuse) == 2
    assert capsys.readouterr().err == ""


def finetune(documents, output, *options):
    small = ["--window", "16", "--steps", "24", "--lanes", "2", "--bptt", "2", "--eval-tokens", "0", "--device", "cpu"]
    small += ["--last-slots", "8", "--no-control", "--rows", "recurrent", "--precision", "float32"]
    command = ["-m", "recur_gpt2.cli", "finetune", "--data", documents, "--output-dir", output, *small, *options]
    return launch(*command, HF_DATASETS_CACHE=str(output.parent / "cache"))


def wait_for(stream, text):
    """Read until the text has come. -> what was read"""
    read = ""
    while text not in read:
        piece = stream.read(1)
        assert piece, read
        read += piece
    return read


def test_a_finetuning_by_two_processes_stops_resumes_and_is_evaluated_once(documents, tmp_path):
    process = finetune(documents, tmp_path / "out")
    read = wait_for(process.stderr, "1/24")
    process.send_signal(signal.SIGINT)  # as Ctrl-C does; torchrun hands it on
    _, errors = process.communicate(timeout=120)
    assert (read + errors).count("interrupted: stopped after step") == 1, errors
    assert len(list((tmp_path / "out" / "recurrent" / "checkpoints").iterdir())) == 1

    process = finetune(documents, tmp_path / "out", "--resume")
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert printed.count("Report, plots and models") == 1
    assert errors.count("tokenising") == 0, "the first run has left the ids in the cache"
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["settings"]["processes"] == COUNT
    assert [row["step"] for row in results["training"]["recurrent"]] == list(range(1, 25))
    assert not list(Path(tmp_path).rglob("*.unfinished"))
