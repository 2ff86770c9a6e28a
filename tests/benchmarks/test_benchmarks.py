"""benchmarks/: each script runs, compares like with like, and ends with one JSON object."""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from conftest import ROOT

BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from common import fresh, number, ratio, summarise  # noqa: E402

TINY = ["--model", "gpt2", "--layers", "2", "--width", "32", "--vocab-size", "300", "--precision", "float32"]
TINY += ["--device", "cpu", "--repeats", "1"]
MEASURED = {"tokens_per_second", "peak_memory_bytes", "speed_ratio", "memory_ratio"}


def bench(script, *options, status=0):
    command = [sys.executable, str(BENCHMARKS / script), *TINY, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done


def last_line(done):
    return json.loads(done.stdout.splitlines()[-1])


def measured(speed, memory=100):
    return {"tokens_per_second": speed, "peak_memory_bytes": memory}


def test_ratios_compare_runs_of_the_same_round():
    runs = {"theirs": [measured(10), measured(20), measured(40)], "ours": [measured(11), measured(22), measured(48)]}
    summary = summarise(runs, "theirs")
    assert summary["ours"]["speed_ratio"] == pytest.approx({"median": 1.1, "min": 1.1, "max": 1.2})
    assert summary["ours"]["tokens_per_second"]["median"] == 22


def test_a_variant_that_fails_leaves_the_others_their_numbers():
    runs = {"theirs": [measured(10)], "ours": [{"error": "out of memory"}]}
    summary = summarise(runs, "theirs")
    assert summary["theirs"]["speed_ratio"]["median"] == 1
    assert summary["ours"] == {"error": "out of memory"}
    assert number(summary["ours"], "tokens_per_second") == "failed"
    assert ratio(summary["ours"], "speed_ratio") == "-"


def test_without_the_baseline_there_are_no_ratios():
    assert summarise({"ours": [measured(10)]}, "theirs")["ours"].keys() == {"tokens_per_second", "peak_memory_bytes"}


def test_a_ratio_says_whether_its_aim_is_met():
    summary = {"speed_ratio": {"median": 0.97, "min": 0.9, "max": 1.0}}
    assert ratio(summary, "speed_ratio", at_least=0.97).endswith("ok")
    assert ratio(summary, "speed_ratio", at_least=0.98).endswith("missed")
    assert ratio(summary, "speed_ratio", at_most=0.9).endswith("missed")


def test_a_process_that_dies_becomes_an_error(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("raise MemoryError('too large')")
    assert fresh(str(script), {}) == {"error": "MemoryError: too large"}


@pytest.mark.slow
def test_training_ends_in_one_json_object(tmp_path):
    variants = ["transformers", "disjoint", "default"]
    options = ["--window", "32", "--bptt", "2", "--lanes", "2", "--steps", "1", "--checkpointing-sweep", "2", "3"]
    done = bench("bench_training.py", *options, "--json", str(tmp_path / "out.json"), "--variants", *variants)
    result = last_line(done)
    assert result == json.loads((tmp_path / "out.json").read_text())
    assert {"benchmark", "settings", "machine", "aims", "variants", "checkpointing_sweep"} <= result.keys()
    assert list(result["variants"]) == variants
    assert list(result["checkpointing_sweep"]) == ["K=2", "K=3"]
    for row in [*result["variants"].values(), *result["checkpointing_sweep"].values()]:
        assert row.keys() >= MEASURED
        assert row["tokens_per_second"]["median"] > 0
        assert row["peak_memory_bytes"]["median"] > 0
    theirs, ours = (result["variants"][name]["first_loss"]["median"] for name in ("transformers", "disjoint"))
    assert ours == pytest.approx(theirs, rel=1e-5), "both must train on the same windows and targets"


@pytest.mark.slow
def test_scoring_ends_in_one_json_object():
    options = ["--tokens", "2048", "--windows", "32", "--parallel-windows", "1", "4"]
    done = bench("bench_scoring.py", *options, "--variants", "transformers", "disjoint", "default")
    result = last_line(done)
    assert {"benchmark", "settings", "machine", "peak_tflops", "windows"} <= result.keys()
    rows = result["windows"]["32"]
    assert list(rows) == ["transformers", "disjoint", "default_p1", "default_p4"]
    for row in rows.values():
        assert row.keys() >= MEASURED | {"growth", "nats"}
    nats = {name: row["nats"]["median"] for name, row in rows.items()}
    assert nats["disjoint"] == pytest.approx(nats["transformers"], rel=1e-5), "both must score the same tokens"
    assert nats["default_p4"] == pytest.approx(nats["default_p1"], rel=1e-5), "P must not change the result"


def run_script(script, *options):
    done = subprocess.run([sys.executable, str(BENCHMARKS / script), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_linear_attention_is_timed_beside_softmax():
    sizes = ["--lengths", "128", "--features", "8", "--precisions", "float32", "--tokens", "256", "--repeats", "1"]
    result = json.loads(run_script("bench_linear_attention.py", *sizes).splitlines()[-1])
    kernels = {row["kernel"]: row for row in result["rows"]}
    assert {"sdpa", "window_attention", "t2r + chunked", "naive"} <= kernels.keys()
    assert kernels["sdpa"]["times_sdpa"]["median"] == 1
    assert all(row["milliseconds"] > 0 for row in kernels.values())


@pytest.mark.slow
def test_decoding_is_timed_early_and_late():
    out = run_script("bench_t2r.py", "decode", "--tokens", "160", "--batches", "2", "--window", "32")
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert [row["attention"] for row in rows] == ["softmax", "t2r 75%", "t2r all", "t2r all, near 64"]
    assert all(row["early"] > 0 and row["late"] > 0 for row in rows)
    # (S, z): heads * k * (d + 1) numbers in float32 for each layer; keys and values of at most 31 tokens otherwise.
    sums, cache, near = 4 * 32 * 65 * 4, 2 * 31 * 256 * 4, 2 * 32 * 256 * 4
    assert [row["state_bytes"] - 16 for row in rows] == [6 * cache, 5 * sums + cache, 6 * sums, 6 * (sums + near)]


def test_quality_is_told_as_a_ratio_with_an_interval_over_documents(tmp_path):
    def recorded(sums):
        return {"nats": sum(sums) / 300, "mflops": 1.0, "sums": sums, "counts": [100, 200]}

    runs = {"softmax": recorded([400.0, 800.0]), "t2r all": recorded([410.0, 820.0])}
    (tmp_path / "record.json").write_text(json.dumps({"pg19-sample": {"256": runs}}))
    options = ["--table", "--record", str(tmp_path / "record.json"), "--data", "pg19-sample", "--windows", "256"]
    out = run_script("bench_t2r.py", "quality", *options)
    assert "| softmax | 54.60 |  |  | 1.00 |" in out
    assert "| t2r all | 60.34 | 1.105 | 1.105 to 1.105 | 1.00 |" in out, "0.1 nats more in each document"


@pytest.mark.slow
def test_the_budget_ends_in_one_json_object():
    options = ["--tokens", "1000", "--step-tokens", "64", "--windows", "32", "--steps", "1"]
    result = last_line(bench("bench_budget.py", *options))
    training, scoring = result["training_float32"], result["scoring_float32"]
    assert list(training) == ["transformers", "gradient checkpointing", "ours, window 32"]
    assert list(scoring) == ["transformers", "ours, window 32"]
    for row in training.values():
        above = row["peak_memory_bytes"]["median"] - 4 * row["weight_bytes"]["median"]
        assert row["above_bytes"]["median"] == above
        assert row["above_ratio"]["median"] == above / training["transformers"]["above_bytes"]["median"]
    losses = [training[name]["first_loss"]["median"] for name in ("transformers", "gradient checkpointing")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for row in scoring.values():
        allowed = 1.1 * row["weight_bytes"]["median"] + 100e6
        assert row["over_aim_bytes"]["median"] == pytest.approx(row["peak_memory_bytes"]["median"] - allowed)


@pytest.mark.slow
def test_generation_ends_in_one_json_object():
    options = ["--parts", "within", "beyond", "long", "--batches", "2", "--tokens", "1100"]
    result = last_line(bench("bench_generation.py", *options, "--long", "300", "500", "--late", "300", "500"))
    assert list(result["within"]["2"]) == ["transformers", "ours"]
    assert list(result["beyond"]) == ["2, drop half", "2, drop half, generate()", "2, sliding"]
    for rows in [*result["within"].values(), *result["beyond"].values()]:
        assert all(row.keys() >= MEASURED for row in rows.values())
    assert result["long"].keys() >= {"300", "500", "late", "memory_ratio", "time_ratio"}


@pytest.mark.parametrize("script", ["bench_training.py", "bench_scoring.py", "bench_budget.py", "bench_generation.py"])
def test_contradictions_are_refused_with_the_way_out(script):
    done = bench(script, "--model", "data/gpt2-mini", status=2)
    assert "add --model gpt2" in done.stderr


@pytest.mark.slow
def test_pairs_are_recalled_sixteen_windows_later_by_pointing_and_not_by_last_positions():
    from recall_task import RecallTask, recall_model, recalled

    from recur_gpt2.training.arguments import TrainingArguments
    from recur_gpt2.training.trainer import Trainer

    found, task = {}, RecallTask(window=16)
    settings = {"steps": 600, "lanes": 16, "bptt": 8, "lr": 2e-3, "recurrence_lr": 5e-3, "precision": "float32"}
    for slots in (0, 512):
        model = recall_model(16, last_slots=8, pointer_slots=slots)
        with TemporaryDirectory() as folder:
            Trainer(model, task, TrainingArguments(**settings, save_every=600), Path(folder)).run()
        found[slots] = recalled(model, task, 16)
    assert min(found[512].values()) > 0.9
    assert found[0][16] < 0.2


def test_the_recall_task_asks_for_pairs_that_stood_there():
    from recall_task import DISTANCES, FILLER, KEYS, RecallTask

    tokens, distances = RecallTask(window=16, windows=20).document(0)
    assert set(distances) == {0, *DISTANCES}
    for place in np.flatnonzero(distances) + 1:  # of the value
        window = place // 16 - distances[place - 1]
        pairs = tokens[window * 16 : (window + 1) * 16]
        where = np.flatnonzero(pairs == tokens[place - 1])
        assert FILLER <= tokens[place - 1] < FILLER + KEYS
        assert tokens[place] in pairs[where + 1]
