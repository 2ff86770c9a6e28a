"""run.py, points.py, models.py: what is tried, what is recorded, and that nothing is done twice."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import DATA, ROOT, random_gpt2

from recur_gpt2 import RecurGPT2LMHeadModel
from recur_gpt2.budget.sweep import models, points, run
from recur_gpt2.budget.sweep.arguments import METHODS, SweepArguments
from recur_gpt2.budget.sweep.choice import best_measured
from recur_gpt2.budget.sweep.models import SweepModels
from recur_gpt2.budget.sweep.points import MARGIN, NOT_FITTING
from recur_gpt2.budget.sweep.report import unmeasured
from recur_gpt2.budget.sweep.run import run_sweep
from recur_gpt2.budget.worker import FAILED, OK, OUT_OF_MEMORY, held
from recur_gpt2.cli.main import main
from recur_gpt2.errors import InputError

MODEL = str(ROOT / "data" / "gpt2-mini")
MIB = 2**20


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(run, "write_report", lambda *_: None)  # its plots take most of the time; tested elsewhere


@pytest.fixture
def jobs(monkeypatch):
    """The jobs that were measured, by a machine on which each lane takes 10 MiB and every job fits."""
    done = []

    def measured(job):
        done.append(job)
        return {"status": OK, "peak_memory_bytes": job.workload.lanes * 10 * MIB, "tokens_per_second": 1000.0}

    monkeypatch.setattr(points, "measured", measured)
    return done


@pytest.fixture
def finetunings(monkeypatch):
    """(folder, flags) of the finetunings that were run, each of which left an empty model; scores are invented."""
    done = []

    def finetuned(folder, flags):
        done.append((folder, flags))
        (folder / "recurrent" / "model").mkdir(parents=True)

    def quality(self, method, window):
        self.path(method, window)
        nats = 4 - window / 1000 - 0.1 * method.model.startswith("recurrent") - 0.2 * ("overlap" in method.protocol)
        return {"nats": nats, "nats_interval": [nats, nats], "token_ppl": 50.0, "model": f"{window}-{method.model}"}

    monkeypatch.setattr(models, "finetuned", finetuned)
    monkeypatch.setattr(SweepModels, "quality", quality)
    monkeypatch.setattr(SweepModels, "check_data", lambda *_: None)
    monkeypatch.setattr(models, "load_config", lambda folder: FakeConfig(folder))
    return done


class FakeConfig:
    """What the name of a model's folder says: .../w256-recurrent+t2r/recurrent/model."""

    def __init__(self, folder):
        window, kind = Path(folder).parts[-3].split("-")
        self.window, self.recurrence, self.is_recurrent = int(window[1:]), kind, kind.startswith("recurrent")
        self.linear_layers = [0] if kind.endswith("t2r") else []


def arguments(tmp_path, **options):
    options = {"budgets": [100 * MIB, 400 * MIB], "windows": [64, 256], "methods": ["disjoint", "recurrent"]} | options
    return SweepArguments(tmp_path / "sweep", MODEL, **options)


def points_of(rows):
    """Those with a budget."""
    return [row for row in rows if row["kind"] == "point" and row["budget_bytes"] is not None]


def key(row):
    return row["method"], row["window"], row.get("budget_bytes"), row.get("length")


def written(args):
    return [json.loads(line) for line in (args.output_dir / "results.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("task", ["train", "score", "embed", "generate"])
def test_every_method_window_and_budget_has_a_row_and_so_has_every_length(task, tmp_path, jobs, finetunings):
    args = arguments(tmp_path, task=task, methods=None)
    rows = run_sweep(args)
    assert rows == written(args)
    expected = {(m, w, b, None) for m in args.methods for w in args.windows for b in [*args.budgets, None]}
    expected |= {(m, 256, None, n) for m in args.methods for n in points.lengths_of(task)}
    assert {key(row) for row in rows} == expected
    assert len(rows) == len(expected)


def test_what_cannot_fit_by_the_formulas_is_not_measured(tmp_path, jobs, finetunings):
    rows = run_sweep(arguments(tmp_path, budgets=[20 * MIB, 400 * MIB]))
    assert {row["status"] for row in points_of(rows) if row["budget_bytes"] == 20 * MIB} == {NOT_FITTING}
    assert all(row["predicted_memory_bytes"] <= MARGIN * 400 * MIB for row in points_of(rows) if row["status"] == OK)
    assert not any(job.budget == 20 * MIB for job in jobs)


def test_a_window_that_fits_nowhere_is_not_finetuned(tmp_path, jobs, finetunings):
    run_sweep(arguments(tmp_path, windows=[64, 1024], budgets=[160 * MIB]))
    assert {row.split("-")[0] for row in (folder.name for folder, _ in finetunings)} == {"w64"}


def test_a_larger_budget_gets_what_is_wished_for_more(tmp_path, jobs, finetunings):
    rows = points_of(run_sweep(arguments(tmp_path, budgets=[200 * MIB, 400 * MIB, 2000 * MIB], windows=[64])))
    lanes = [row["settings"]["lanes"] for row in rows if row["method"] == "recurrent"]
    assert lanes == sorted(lanes)
    assert lanes[0] < lanes[-1] == 16
    assert {row["settings"]["windows"] for row in rows} == {4}, "gradients reach equally far back everywhere"


def test_running_out_of_memory_is_recorded_and_the_next_settings_are_tried(tmp_path, monkeypatch, finetunings):
    def measured(job):
        if job.workload.lanes > 2:
            return {"status": OUT_OF_MEMORY, "reason": "needed more"}
        return {"status": OK, "peak_memory_bytes": MIB, "tokens_per_second": 1.0}

    monkeypatch.setattr(points, "measured", measured)
    rows = points_of(run_sweep(arguments(tmp_path, windows=[64], methods=["recurrent"], budgets=[2000 * MIB])))
    assert [row["status"] for row in rows] == [OUT_OF_MEMORY] * 3 + [OK]
    assert [row["settings"]["lanes"] for row in rows] == [16, 8, 4, 2]
    assert "nats" in rows[-1]
    assert not any("nats" in row for row in rows[:-1])


def test_what_took_more_than_a_budget_has_run_out_of_it(tmp_path, monkeypatch, finetunings):
    """Also where it was measured for a larger one."""

    def measured(job):
        peak = 300 * MIB if job.workload.lanes > 1 else 10 * MIB
        return held({"status": OK, "peak_memory_bytes": peak, "tokens_per_second": 1.0}, job.budget)

    monkeypatch.setattr(points, "measured", measured)
    budgets = [310 * MIB, 299 * MIB]
    large, *small = points_of(run_sweep(arguments(tmp_path, windows=[64], methods=["recurrent"], budgets=budgets)))
    assert (large["status"], large["peak_memory_bytes"]) == (OK, 300 * MIB)
    assert (small[0]["settings"], small[0]["status"]) == (large["settings"], OUT_OF_MEMORY)
    assert small[0]["reason"] == "took 300 MiB"
    assert [row["peak_memory_bytes"] for row in small if row["status"] == OK] == [10 * MIB]


def test_the_same_settings_are_measured_once(tmp_path, jobs, finetunings):
    args = arguments(tmp_path, budgets=[2000 * MIB, 3000 * MIB], methods=["disjoint", "overlap"])
    rows = points_of(run_sweep(args))
    assert len(rows) == 8
    # Disjoint and overlapping reading want the same finetuning: the largest and the least at each window; four lengths.
    assert len(jobs) == 2 * 2 + 4


def test_finetuning_measures_gpt2_and_reading_the_finetuned_model(tmp_path, jobs, finetunings):
    run_sweep(arguments(tmp_path))
    assert {job.model for job in jobs} == {MODEL}
    jobs.clear()
    args = SweepArguments(
        tmp_path / "read", task="score", budgets=[400 * MIB], windows=[64, 256], methods=["recurrent"]
    )
    run_sweep(args)
    folders = {str(args.finetuned / f"w{window}-recurrent" / "recurrent" / "model") for window in (64, 256)}
    assert {str(job.model) for job in jobs} == folders


def test_each_kind_of_model_is_finetuned_once_a_window_on_as_many_tokens(tmp_path, jobs, finetunings):
    run_sweep(arguments(tmp_path, methods=None, finetune_tokens=5 * 8192))
    kinds = {method.model for method in METHODS.values()}
    assert sorted(folder.name for folder, _ in finetunings) == sorted(f"w{w}-{k}" for w in (64, 256) for k in kinds)
    for folder, flags in finetunings:
        value = {flag: flags[flags.index(flag) + 1] for flag in ("--steps", "--lanes", "--bptt", "--accumulate")}
        steps, lanes, bptt, accumulate = map(int, value.values())
        window = int(folder.name.split("-")[0][1:])
        assert steps * lanes * bptt * accumulate * window == 5 * 8192


def test_without_tokens_to_score_nothing_is_finetuned(tmp_path, jobs, finetunings):
    rows = run_sweep(arguments(tmp_path, task="score", eval_tokens=0))
    assert not finetunings
    assert {job.model for job in jobs} == {MODEL}
    assert not any("nats" in row for row in rows)


def test_an_interrupted_sweep_goes_on_and_ends_as_one_that_was_not(tmp_path, monkeypatch, jobs, finetunings):
    whole = run_sweep(arguments(tmp_path / "whole"))
    measured, done = points.measured, len(jobs)

    def interrupted(job):
        if len(jobs) == done + 5:
            raise KeyboardInterrupt
        return measured(job)

    monkeypatch.setattr(points, "measured", interrupted)
    args = arguments(tmp_path)
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        run_sweep(args)
    before = written(args)
    assert 0 < len(before) < len(whole)
    monkeypatch.setattr(points, "measured", measured)
    rows = run_sweep(arguments(tmp_path, resume=True))
    assert rows[: len(before)] == before
    assert [key(row) for row in rows] == [key(row) for row in whole]
    count = len(jobs)
    assert run_sweep(arguments(tmp_path, resume=True)) == rows
    assert len(jobs) == count, "nothing is measured again"
    run_sweep(arguments(tmp_path, resume=True, budgets=[100 * MIB, 400 * MIB, 500 * MIB]))
    assert {job.budget for job in jobs[count:]} == {500 * MIB}


def test_text_that_is_not_there_is_said_before_anything_is_done(tmp_path, jobs):
    args = SweepArguments(tmp_path / "sweep", data=str(tmp_path / "nowhere.txt"), windows=[64])
    with pytest.raises(InputError, match=r"nowhere\.txt' is neither a file"):
        run_sweep(args)
    assert not jobs
    assert not args.output_dir.exists()


def test_what_was_measured_survives_a_failed_finetuning_and_is_scored_later(tmp_path, monkeypatch, jobs, finetunings):
    def failing(folder, flags):
        raise subprocess.CalledProcessError(2, ["finetune"])

    works = models.finetuned
    monkeypatch.setattr(models, "finetuned", failing)
    rows = points_of(run_sweep(arguments(tmp_path, methods=["recurrent"])))
    measured = [row for row in rows if row["budget_bytes"] == 400 * MIB]
    assert {row["status"] for row in measured} == {OK}
    assert all(row["peak_memory_bytes"] and "ended with status 2" in row["unscored"] for row in measured)
    assert "measured, not scored (" in unmeasured(rows)
    before = len(jobs)
    monkeypatch.setattr(models, "finetuned", works)
    again = points_of(run_sweep(arguments(tmp_path, methods=["recurrent"], resume=True)))
    assert len(jobs) == before, "nothing is measured twice"
    scored = [row for row in again if row["budget_bytes"] == 400 * MIB]
    assert all(row["nats"] > 0 and "unscored" not in row for row in scored)
    assert len({key(row) for row in again}) == len(again) == len(rows)


def test_a_measurement_that_fails_leaves_those_before_it_and_is_tried_again(tmp_path, monkeypatch, jobs, finetunings):
    works = points.measured

    def failing(job):
        if job.budget == 400 * MIB:
            raise subprocess.CalledProcessError(2, ["python", "-m", "measure", "it"])
        return works(job)

    budgets = [300 * MIB, 400 * MIB]
    monkeypatch.setattr(points, "measured", failing)
    rows = points_of(run_sweep(arguments(tmp_path, methods=["recurrent"], budgets=budgets)))
    assert {row["status"] for row in rows if row["budget_bytes"] == 400 * MIB} == {FAILED}
    kept = [row for row in rows if row["budget_bytes"] == 300 * MIB]
    assert kept
    assert FAILED not in {row["status"] for row in kept}
    monkeypatch.setattr(points, "measured", works)
    again = points_of(run_sweep(arguments(tmp_path, methods=["recurrent"], budgets=budgets, resume=True)))
    assert {row["status"] for row in again if row["budget_bytes"] == 400 * MIB} == {OK}
    assert all(row in again for row in kept)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"task": "read"}, "task='read'"),
        ({"methods": ["hybrid"]}, "method 'hybrid'"),
        ({"task": "embed", "methods": ["overlap"]}, "method 'overlap' is none of task embed's"),
        ({"windows": [64, 2048]}, "window=2048 exceeds the model's 1024"),
        ({"finetune_tokens": 100}, "finetune_tokens=100"),
        ({"lanes": 3}, "lanes=3"),
        ({"resume": True}, "nothing to resume"),
    ],
    ids=str,
)
def test_bad_input_is_refused_in_a_sentence_and_writes_nothing(options, said, tmp_path, jobs):
    with pytest.raises(InputError, match=said):
        run_sweep(arguments(tmp_path, **options))
    assert not (tmp_path / "sweep").exists()
    assert not jobs


def test_a_sweep_of_other_settings_is_neither_overwritten_nor_mixed_in(tmp_path, jobs, finetunings):
    run_sweep(arguments(tmp_path))
    before = written(arguments(tmp_path))
    with pytest.raises(InputError, match="already holds a sweep"):
        run_sweep(arguments(tmp_path))
    with pytest.raises(InputError, match="has finetune_tokens=327680, not 81920"):
        run_sweep(arguments(tmp_path, resume=True, finetune_tokens=81920))
    assert written(arguments(tmp_path)) == before


def test_a_sweep_starts_from_a_gpt2(tmp_path):
    with pytest.raises(InputError, match="starts from a GPT-2"):
        run_sweep(SweepArguments(tmp_path / "sweep", model=str(DATA / "recur-gpt2-mini")))


def test_budgets_not_given_go_from_the_least_that_holds_a_point_to_the_most_of_use(tmp_path, jobs, finetunings):
    args = arguments(tmp_path, budgets=None)
    rows = points_of(run_sweep(args))
    assert args.budgets == sorted(args.budgets)
    by_budget = {budget: [row for row in rows if row["budget_bytes"] == budget] for budget in args.budgets}
    assert any(row["status"] == OK for row in by_budget[args.budgets[0]])
    assert {row["settings"]["lanes"] for row in by_budget[args.budgets[-1]]} == {16, 8}, "as many as a step can use"


def test_progress_says_what_is_done_and_how_long_the_rest_takes(tmp_path, jobs, finetunings, capsys):
    run_sweep(arguments(tmp_path))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert lines[0] == "[  0%] disjoint, window 64"
    assert len(lines) == 4 + 8
    assert all("min left]" in line for line in lines[1:])


def test_models_that_lie_there_are_used_if_they_are_what_they_should_be(tmp_path):
    random = random_gpt2(n_layer=2, vocab_size=300)
    random.save_pretrained(tmp_path / "gpt2")
    settings = {"data": "pg19-sample", "finetune_tokens": 8192, "eval_split": "test", "eval_tokens": 100}
    made = SweepModels(tmp_path, str(tmp_path / "gpt2"), **settings, precision="float32")
    mine = RecurGPT2LMHeadModel.from_gpt2(tmp_path / "gpt2", window=16, last_slots=4)
    folder = tmp_path / "w16-recurrent" / "recurrent" / "model"
    mine.save_pretrained(folder)
    assert not made.missing(METHODS["recurrent"], 16)
    assert made.path(METHODS["recurrent+overlap"], 16) == folder
    shutil.copytree(tmp_path / "w16-recurrent", tmp_path / "w16-t2r")
    with pytest.raises(InputError, match="is not t2r at window 16"):
        made.path(METHODS["t2r"], 16)


def test_the_best_measured_point_within_the_budget_is_recommended(tmp_path, jobs, finetunings):
    args = arguments(tmp_path, methods=["disjoint", "overlap", "recurrent"], budgets=[200 * MIB, 1000 * MIB])
    rows = [row for row in run_sweep(args) if "nats" in row]
    for budget in (110, 150, 230, 1000):
        row, found = best_measured(args.output_dir, budget * MIB, "train")
        within = [each for each in rows if 1.1 * each["peak_memory_bytes"] + 96 * MIB <= budget * MIB]
        assert row["nats"] == min(each["nats"] for each in within)
        assert (found.config.window, found.workload.lanes) == (row["window"], row["settings"]["lanes"])
        assert found.config.is_recurrent == (row["method"] == "recurrent")
    with pytest.raises(InputError, match="the least is 107 MiB"):
        best_measured(args.output_dir, 70 * MIB, "train")
    with pytest.raises(InputError, match="give --task train"):
        best_measured(args.output_dir, 200 * MIB, "score")
    with pytest.raises(InputError, match="holds no sweep"):
        best_measured(tmp_path, 200 * MIB, "score")


@pytest.mark.parametrize("task", ["train", "score"])
def test_the_command_line_recommends_from_a_sweep(task, tmp_path, jobs, finetunings, capsys):
    run_sweep(arguments(tmp_path, task=task, methods=["recurrent+t2r"], windows=[256]))
    capsys.readouterr()
    words = ["recommend", "--task", task, "--budget", "1GiB", "--sweep", str(tmp_path / "sweep")]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "token perplexity 50.00" in said
    expected = "--attention t2r --near-tokens 64" if task == "train" else "--model 256-recurrent+t2r --window 256"
    assert expected in said.splitlines()[-1]


def test_the_settings_that_take_least_are_measured_too_if_any_budget_holds_them(tmp_path, jobs, finetunings):
    rows = run_sweep(arguments(tmp_path, windows=[64, 256, 1024], budgets=[160 * MIB]))
    least = {row["window"]: row for row in rows if row["method"] == "disjoint" and key(row)[2:] == (None, None)}
    assert least[1024]["status"] == NOT_FITTING
    for window in (64, 256):
        assert (least[window]["settings"]["lanes"], least[window]["settings"]["checkpointing"]) == (1, True)
        assert least[window]["nats"] > 0


@pytest.mark.slow
def test_a_sweep_measures_finetunes_and_scores(tmp_path, monkeypatch, capsys):
    """The whole of it with a model of random weights; and a sweep of another task takes over its models and scores."""
    monkeypatch.setattr(points, "OTHER_LENGTHS", ())
    monkeypatch.setattr("recur_gpt2.budget.sweep.points.STEPS", 2)
    monkeypatch.setattr("recur_gpt2.budget.sweep.points.READ_TOKENS", 512)
    folder = tmp_path / "texts"
    for number, split in enumerate(["train"] * 8 + ["test"] * 2):
        (folder / split).mkdir(parents=True, exist_ok=True)
        (folder / split / f"{number}.txt").write_text(f"the {number} cat sat on a mat " * 50)
    random_gpt2(n_layer=2, vocab_size=8192).save_pretrained(tmp_path / "gpt2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(MODEL) / name, tmp_path / "gpt2")
    words = ["sweep", "--model", str(tmp_path / "gpt2"), "--data", str(folder), "--windows", "16", "--budget", "1GiB"]
    words += ["--methods", "recurrent+overlap", "--finetune-tokens", "8192", "--eval-tokens", "300"]
    words += ["--precision", "float32"]
    assert main([*words, "--output-dir", str(tmp_path / "train")]) == 0
    rows = points_of([json.loads(line) for line in (tmp_path / "train" / "results.jsonl").read_text().splitlines()])
    assert [row["status"] for row in rows] == [OK]
    for row in rows:
        assert sum(row["document_nats"]) / sum(row["document_tokens"]) == pytest.approx(row["nats"])
        assert 0 < row["peak_memory_bytes"] < 2**30
        assert row["tokens_per_second"] > 0
        assert row["bits_per_byte"] > 0
    capsys.readouterr()
    shared = ["--task", "score", "--finetuned", str(tmp_path / "train" / "finetuned")]
    assert main([*words, "--output-dir", str(tmp_path / "score"), *shared]) == 0
    assert "+ " not in capsys.readouterr().out, "nothing was finetuned or scored again"
    again = points_of([json.loads(line) for line in (tmp_path / "score" / "results.jsonl").read_text().splitlines()])
    assert [row["nats"] for row in again] == [row["nats"] for row in rows]
