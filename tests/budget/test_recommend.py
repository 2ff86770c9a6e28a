"""recommend.py: what is recommended fits, is the best that does, and runs inside the limit it was made for."""

import argparse
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

from recur_gpt2.budget.memory_model import memory_use
from recur_gpt2.budget.recommend import candidates, command, parse_bytes, recommend
from recur_gpt2.cli.finetune import add_arguments, settle
from recur_gpt2.cli.main import main
from recur_gpt2.errors import InputError
from recur_gpt2.utils.thread_cache import tuned_environment

MODEL = str(ROOT / "data" / "gpt2-mini")
MIB = 2**20
# Finetunes, saves and scores, while the system refuses more than the budget. It counts what is reserved and not used,
# too, and is given room for that: so that the memory in use is looked at as well, at all peaks of the run.
LIMITED = """
import sys
from recur_gpt2.budget import worker
from recur_gpt2.utils import measure
budget, peaks = int(sys.argv[1]), []
base = worker.limit_memory(budget)
reset = measure.reset_peak
def reset_peak():
    peaks.append(measure.peak_resident())
    return reset()
measure.reset_peak = reset_peak
from recur_gpt2.cli.main import main
failed = main(sys.argv[2:])
reset_peak()
sys.exit(failed or max(peaks) - base > budget and f"{(max(peaks) - base) / 2**20:.0f} MiB in use")
"""


@pytest.mark.parametrize(
    ("text", "amount"),
    [("512MiB", 512 * MIB), ("2GiB", 2**31), ("1.5 GiB", 3 * 2**29), ("2g", 2 * 10**9), ("100MB", 10**8), ("77", 77)],
)
def test_amounts_of_memory_are_read(text, amount):
    assert parse_bytes(text) == amount


@pytest.mark.parametrize("text", ["", "much", "2 TiB", "-1GiB", "1GiB2"])
def test_what_is_no_amount_of_memory_is_refused(text):
    with pytest.raises(InputError, match="512MiB"):
        parse_bytes(text)


@pytest.mark.parametrize("task", ["train", "score", "embed", "generate"])
@pytest.mark.parametrize("budget", [280, 360, 500, 1000, 3000])
def test_what_is_recommended_fits_and_nothing_wished_for_more_does(task, budget):
    found = recommend(MODEL, budget * MIB, task)
    assert found.peak <= budget * MIB
    assert memory_use(found.config, found.workload) == found.use
    wished = candidates(found.config, task, found.workload.precision)
    before = list(iter(lambda: next(wished), found))
    assert all(each.peak > budget * MIB for each in before)


def test_a_larger_budget_never_gets_a_smaller_window():
    windows = [recommend(MODEL, budget * MIB).config.window for budget in range(300, 1300, 100)]
    assert windows == sorted(windows)


def test_every_step_has_as_many_tokens():
    for budget in (280, 320, 460, 860, 2000):
        found = recommend(MODEL, budget * MIB)
        work = found.workload
        whole = 8192 // (4 * found.config.window) * 4 * found.config.window  # 960 does not divide it
        assert work.lanes * work.windows * found.config.window * work.accumulate == whole > 7500


def test_the_longest_window_leaves_positions_for_the_memory_in_front_of_it():
    """At 1,024 there are none, and memory is worth nothing: docs/memory_budget.md."""
    config = recommend(MODEL, 2**31).config
    assert config.window == 960
    assert config.position_offset == config.memory_slots
    assert recommend(MODEL, 2**31, recurrence="none").config.window == 1024
    assert recommend(MODEL, 2**31, windows=(1024,)).config.window == 1024


def test_a_window_that_was_asked_for_is_the_one_or_is_refused(tmp_path):
    assert recommend(MODEL, 2**31, windows=(500,)).config.window == 500
    with pytest.raises(InputError, match="window=4096 exceeds the model's 1024 positions"):
        recommend(MODEL, 2**31, windows=(4096,))
    ours = str(ROOT / "data" / "recur-gpt2-mini")
    assert recommend(ours, 2**31, windows=(256,)).config.window == 256
    with pytest.raises(InputError, match="made for window=256, not 64"):
        recommend(ours, 2**31, windows=(64,))


def test_a_budget_that_holds_nothing_is_refused_with_the_least_that_would():
    with pytest.raises(InputError, match="the least is") as refused:
        recommend(MODEL, 50 * MIB)
    least = int(str(refused.value).split("the least is ")[1].split()[0])
    assert recommend(MODEL, (least + 1) * MIB).config.window == 64


def test_no_more_lanes_than_there_are_documents():
    for most in (1, 3, 8):
        found = recommend(MODEL, 2**31, windows=(64,), most_lanes=most)
        assert found.workload.lanes == {1: 1, 3: 2, 8: 8}[most]
        assert found.workload.lanes * found.workload.accumulate * 4 * 64 == 8192
    assert recommend(MODEL, 2**31, windows=(64,)).workload.lanes == 16


def test_a_window_that_was_asked_for_is_kept():
    assert recommend(MODEL, 2**31, windows=(128,)).config.window == 128


def test_the_command_line_prints_a_command_that_parses(capsys):
    assert main(["recommend", "--model", MODEL, "--budget", "400MiB"]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words[:2] == ["recur-gpt2", "finetune"]
    assert main(["recommend", "--model", MODEL, "--budget", "nothing"]) == 2


@pytest.mark.parametrize("flags", [["--bptt", "4"], ["--checkpointing"]], ids=" ".join)
def test_a_budget_and_what_it_chooses_contradict_each_other(flags, capsys, tmp_path):
    status = main(["finetune", "--memory-budget", "1GiB", "--output-dir", str(tmp_path / "run"), *flags])
    assert status == 2
    assert flags[0] in capsys.readouterr().err


@pytest.mark.parametrize("quiet", [False, True])
def test_a_budget_fills_in_the_settings_and_one_process_says_which(quiet, capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["--memory-budget", "400MiB", "--precision", "float32"])
    settle(args, {}, quiet=quiet)
    best = recommend(MODEL, 400 * MIB, precision="float32", most_lanes=args.lanes)
    assert (args.window, args.bptt) == (best.config.window, best.workload.windows)
    assert (args.lanes, args.accumulate) == (best.workload.lanes, best.workload.accumulate)
    assert (f"window {args.window}" in capsys.readouterr().out) is not quiet


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits are Linux's")
@pytest.mark.parametrize(("budget", "cold"), [(330, True), (900, False)])
def test_the_recommended_run_stays_inside_a_limit_of_the_system(budget, cold, tmp_path):
    """cold: the text is not tokenised yet, and that is done first in the same process."""
    words = shlex.split(command(recommend(MODEL, budget * MIB), MODEL))[1:]
    words += ["--steps", "2", "--eval-tokens", "2048", "--no-control", "--output-dir", str(tmp_path / "run")]
    words += ["--rows", "base_overlap", "recurrent", "recurrent_shuffled"]
    cache = {"HF_DATASETS_CACHE": str(tmp_path / "cache")} if cold else {}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(budget * MIB), *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=tuned_environment() | {"OMP_NUM_THREADS": "1"} | cache,  # as the command begins
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "results.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits are Linux's")
def test_a_limit_below_what_is_needed_stops_the_run(tmp_path):
    """So that the test above can fail."""
    words = shlex.split(command(recommend(MODEL, 900 * MIB), MODEL))[1:]
    words += ["--steps", "1", "--eval-tokens", "8192", "--output-dir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(200 * MIB), *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=tuned_environment(),
    )
    assert done.returncode != 0
