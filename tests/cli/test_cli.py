"""The command line: what it prints, its exit statuses, and one clear sentence for each kind of bad input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from recur_gpt2 import DocumentEmbedder, InputError
from recur_gpt2.cli.main import main
from recur_gpt2.utils.device import checked_device

MODEL = ROOT / "data" / "gpt2-mini"
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "my", "dog", "that", "came", "by", "today"]


def text(count, start=0):
    return " ".join(WORDS[(start + 3 * n * n + n) % len(WORDS)] for n in range(count))


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No test may wait for a network, or fill the user's cache."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def documents(tmp_path):
    """A folder of six short documents."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text(text(60 + 20 * number, number), encoding="utf-8")
    return folder


def finetune(documents, output, *options):
    small = ["--window", "16", "--steps", "2", "--lanes", "2", "--bptt", "2", "--eval-tokens", "0", "--device", "cpu"]
    small += ["--last-slots", "8", "--precision", "float32"]
    return main(["finetune", "--data", str(documents), "--output-dir", str(output), *small, *options])


def refused(status, capsys):
    """The one sentence of a refusal."""
    err = capsys.readouterr().err.strip()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2, err
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def test_finetune_writes_everything_and_prints_the_table(documents, tmp_path, capsys):
    assert finetune(documents, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    names = [row["name"] for row in results["rows"]]
    expected = ["base_disjoint", "base_overlap", "finetuned_disjoint", "finetuned_overlap", "recurrent"]
    assert names[:5] == expected
    assert {"recurrent_overlap", "recurrent_zeroed"} <= set(names)
    assert all(name in printed for name in names)
    needed = {"name", "protocol", "window", "tokens", "token_ppl", "word_ppl", "bits_per_byte", "flops_per_token"}
    assert all(needed | {"peak_memory_bytes", "tokens_per_second"} <= row.keys() for row in results["rows"])
    assert len({row["tokens"] for row in results["rows"]}) == 1
    for name in (
        "report.md",
        "protocols.png",
        "loss_by_position.png",
        "training.png",
        "recurrent/model/tokenizer.json",
    ):
        assert (tmp_path / "out" / name).stat().st_size > 0


def test_finetune_takes_linear_attention_and_its_transfer(documents, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "recur_gpt2.models.feature_map_fitting.DISTIL_STEPS", 2
    )  # how well maps fit is tested elsewhere
    flags = ["--attention", "t2r", "--t2r-layers", "75%", "--feature-map", "hedgehog", "--feature-size", "16"]
    flags += ["--near-tokens", "5"]
    flags += ["--transfer-steps", "2", "--new-first-steps", "1", "--carry-linear-state", "--rows", "recurrent"]
    assert finetune(documents, tmp_path / "out", *flags, "--no-control") == 0
    config = json.loads((tmp_path / "out" / "recurrent" / "model" / "config.json").read_text())
    assert config["linear_layers"] == [0, 1, 3, 4, 5]
    assert (config["feature_map"], config["feature_size"], config["carry_linear_state"]) == ("hedgehog", 16, True)
    assert config["near_tokens"] == 5
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    measures = [("divergence" in row, "loss" in row) for row in results["training"]["recurrent"]]
    assert measures == [(True, False)] * 2 + [(False, True)] * 2


def test_convert_writes_a_model_that_finetune_goes_on_with(documents, tmp_path, capsys):
    converted = tmp_path / "converted"
    options = ["--window", "16", "--feature-map", "elu", "--layers", "0", "4", "--output", str(converted)]
    assert main(["convert", *options]) == 0
    printed = capsys.readouterr().out
    assert "layers [0, 4] have linear attention now" in printed
    assert f"recur-gpt2 finetune --model {converted} --window 16\n" in printed, "elu has nothing to transfer"
    flags = [
        "--model",
        str(converted),
        "--recurrence",
        "none",
        "--rows",
        "base_disjoint",
        "finetuned_disjoint",
        "recurrent",
    ]
    small = ["--window", "16", "--steps", "2", "--lanes", "2", "--bptt", "2", "--eval-tokens", "0", "--device", "cpu"]
    command = ["finetune", "--data", str(documents), "--output-dir", str(tmp_path / "out"), *small, *flags]
    assert main([*command, "--precision", "float32"]) == 0
    config = json.loads((tmp_path / "out" / "recurrent" / "model" / "config.json").read_text())
    assert config["linear_layers"] == [0, 4]
    control = json.loads((tmp_path / "out" / "disjoint" / "model" / "config.json").read_text())
    assert control["linear_layers"] == [], "the control is the GPT-2 in it"

    assert "exists already; give another --output" in refused(main(["convert", *options]), capsys)
    again = ["convert", "--model", str(converted), "--output", str(tmp_path / "twice")]
    assert "layers [0, 4] have linear attention already" in refused(main(again), capsys)
    other = [*command[:4], str(tmp_path / "other"), *command[5:], "--attention", "t2r", "--feature-map", "t2r"]
    assert "was made with linear_layers=[0, 4], not 'all'" in refused(main(other), capsys)


def test_evaluate_scores_a_saved_recurrent_model(documents, tmp_path, capsys):
    assert finetune(documents, tmp_path / "out", "--no-control") == 0
    model = tmp_path / "out" / "recurrent" / "model"
    report = tmp_path / "rows.json"
    options = ["--data", str(documents), "--split", "test", "--json", str(report), "--precision", "float32"]
    assert main(["evaluate", "--model", str(model), *options]) == 0
    rows = {row["name"]: row for row in json.loads(report.read_text())["rows"]}
    assert rows.keys() >= {"disjoint", "overlap", "recurrent", "recurrent+overlap", "zeroed"}
    trained = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    recurrent = next(row for row in trained if row["name"] == "recurrent")
    assert rows["recurrent"]["nats"] == pytest.approx(recurrent["nats"], abs=1e-5)
    assert rows["zeroed"]["nats"] == pytest.approx(rows["disjoint"]["nats"], abs=1e-6)


def test_evaluate_scores_a_gpt2_with_an_untrained_recurrence(documents, tmp_path):
    report = tmp_path / "rows.json"
    scored = ["--protocols", "disjoint", "recurrent", "--json", str(report), "--precision", "float32"]
    assert main(["evaluate", "--data", str(documents), "--window", "16", "--recurrence", "default", *scored]) == 0
    assert [row["name"] for row in json.loads(report.read_text())["rows"]] == ["disjoint", "recurrent"]


def test_a_finished_run_is_not_overwritten(documents, tmp_path, capsys):
    assert finetune(documents, tmp_path / "out", "--no-control") == 0
    before = (tmp_path / "out" / "results.json").read_bytes()
    message = refused(finetune(documents, tmp_path / "out", "--no-control"), capsys)
    assert "--resume" in message
    assert (tmp_path / "out" / "results.json").read_bytes() == before


def test_resuming_a_finished_run_gives_the_same_rows(documents, tmp_path):
    assert finetune(documents, tmp_path / "out") == 0
    before = json.loads((tmp_path / "out" / "results.json").read_text())
    assert finetune(documents, tmp_path / "out", "--resume") == 0
    after = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["nats"] for row in after["rows"]] == [row["nats"] for row in before["rows"]]
    assert after["training"] == before["training"]


def test_resuming_another_configuration_is_refused(documents, tmp_path, capsys):
    assert finetune(documents, tmp_path / "out", "--no-control") == 0
    message = refused(finetune(documents, tmp_path / "out", "--no-control", "--resume", "--lr", "0.1"), capsys)
    assert "lr" in message
    assert "0.1" in message


def test_nothing_to_resume_is_refused(documents, tmp_path, capsys):
    assert "nothing to resume" in refused(finetune(documents, tmp_path / "out", "--resume"), capsys)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--window", "2048"], ["2048", "1024", "--window"]),
        (["--window", "1"], ["window=1", "at least 2"]),
        (["--lanes", "50"], ["lanes=50", "--lanes"]),
        (["--steps", "0"], ["steps=0"]),
        (["--bptt", "0"], ["bptt=0"]),
        (["--lr", "-1"], ["lr=-1"]),
        (["--recurrence", "lstm"], ["lstm", "yoshida2020"]),
        (["--feature-map", "elu"], ["--feature-map is for linear attention", "--attention t2r"]),
        (["--attention", "t2r", "--t2r-layers", "50%"], ["50%", "75%", "all"]),
        (["--attention", "t2r", "--t2r-layers", "6"], ["[6]", "0 to 5"]),
        (["--transfer-steps", "3"], ["transfer_steps=3", "--attention t2r"]),
        (["--insert-layers", "9"], ["insert_layers", "9"]),
        (["--last-slots", "99"], ["last_slots=99", "window=16"]),
        (["--device", "cuda"], ["cuda", "--device cpu"]),
        (["--model", "no/such-gpt2"], ["no/such-gpt2", "data/gpt2-mini"]),
        (["--eval-tokens", "1"], ["eval_tokens=1"]),
    ],
    ids=lambda value: "".join(value[:2]) if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_bad_values_are_refused_in_one_sentence(options, words, documents, tmp_path, capsys):
    import torch

    if options == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    message = refused(finetune(documents, tmp_path / "out", *options), capsys)
    assert all(word in message for word in words), message


def test_a_bad_model_option_is_refused_before_anything_is_tried(documents, tmp_path, capsys, monkeypatch):
    def trial(*_):
        raise AssertionError("the precisions were tried")

    monkeypatch.setattr("recur_gpt2.evaluation.comparison.autocast_dtype", trial)
    message = refused(finetune(documents, tmp_path / "out", "--precision", "auto", "--last-slots", "99"), capsys)
    assert "last_slots=99" in message
    assert not (tmp_path / "out").exists()


def test_an_unknown_dataset_names_what_is_bundled(tmp_path, capsys):
    message = refused(finetune("no-such-data", tmp_path / "out"), capsys)
    assert all(word in message for word in ("no-such-data", "pg19-sample", "wikitext-103-sample")), message


def test_a_hub_dataset_without_network_is_refused(tmp_path, capsys):
    message = refused(finetune("pg19", tmp_path / "out"), capsys)
    assert all(word in message for word in ("emozilla/pg19", "pg19-sample")), message


def write_bad(tmp_path, kind):
    """A file of bad text, and a word that the refusal must hold."""
    path = tmp_path / {"columns": "bad.parquet", "jsonl": "bad.jsonl"}.get(kind, "bad.txt")
    if kind == "empty":
        path.write_text("")
    elif kind == "whitespace":
        path.write_text(" \n\t ")
    elif kind == "one token":
        path.write_text("the")
    elif kind == "not utf-8":
        path.write_bytes(b"good text " + b"\xff\xfe" + b" more")
    elif kind == "columns":
        pq.write_table(pa.table({"body": ["some text"]}), path)
    elif kind == "jsonl":
        path.write_text('{"text": "fine"}\n{"text": \n')
    return path


@pytest.mark.parametrize("kind", ["empty", "whitespace", "one token", "not utf-8", "columns", "jsonl"])
def test_bad_documents_are_refused_by_name(kind, tmp_path, capsys):
    path = write_bad(tmp_path, kind)
    assert path.name in refused(finetune(path, tmp_path / "out"), capsys)


def copy_model(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    return folder


def test_truncated_weights_are_refused(documents, tmp_path, capsys):
    folder = copy_model(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    message = refused(finetune(documents, tmp_path / "out", "--model", str(folder)), capsys)
    assert "cannot be read" in message
    assert str(folder) in message


def test_a_truncated_recurrent_model_is_refused(documents, tmp_path, capsys):
    assert finetune(documents, tmp_path / "out", "--no-control") == 0
    folder = tmp_path / "out" / "recurrent" / "model"
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    capsys.readouterr()
    message = refused(main(["evaluate", "--model", str(folder), "--data", str(documents)]), capsys)
    assert str(folder) in message


def test_another_architecture_is_refused(documents, tmp_path, capsys):
    folder = copy_model(tmp_path)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 8}))
    message = refused(finetune(documents, tmp_path / "out", "--model", str(folder)), capsys)
    assert "bert" in message
    assert "GPT-2" in message


def test_a_model_without_tokenizer_is_refused(documents, tmp_path, capsys):
    folder = copy_model(tmp_path)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "tokenizer" in refused(finetune(documents, tmp_path / "out", "--model", str(folder)), capsys)


def test_refused_input_leaves_the_folder_of_another_run_alone(documents, tmp_path, capsys):
    assert finetune(documents, tmp_path / "out", "--no-control") == 0
    files = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    refused(finetune(documents, tmp_path / "out", "--no-control", "--resume", "--window", "8"), capsys)
    refused(finetune(documents, tmp_path / "out", "--no-control", "--resume", "--steps", "9"), capsys)
    assert {path: path.read_bytes() for path in files} == files


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", "{", "config.json of"),
        ("config.json", "[1]", "config.json of"),
        ("config.json", '{"model_type": "gpt2", "n_layer": "six"}', "n_layer"),
        ("tokenizer.json", "{}", "the tokenizer of"),
        ("tokenizer_config.json", "[1]", "the tokenizer of"),
        ("pytorch_model.bin", "", "the weights of"),
    ],
)
def test_a_damaged_file_of_a_model_is_refused_by_name(file, content, said, documents, tmp_path, capsys):
    folder = copy_model(tmp_path)
    (folder / file).write_text(content)
    if file == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    message = refused(main(["evaluate", "--model", str(folder), "--data", str(documents)]), capsys)
    assert said in message
    assert str(folder) in message


def test_weights_that_are_more_than_tensors_are_not_opened(documents, tmp_path, capsys):
    class RunsCode:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    folder = copy_model(tmp_path)
    torch.save({**load_file(folder / "model.safetensors"), "more": RunsCode()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    for command in (["evaluate", "--data", str(documents)], ["generate", "--prompt", "It"]):
        message = refused(main([*command, "--model", str(folder)]), capsys)
        assert "a pickle of more than tensors" in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a place that nobody can write to")
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_computed(
    documents, tmp_path, capsys, monkeypatch
):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("recur_gpt2.models.loading.load_any", load)
    monkeypatch.setattr("recur_gpt2.embedding.embedder.load_any", load)
    monkeypatch.setattr("recur_gpt2.evaluation.scoring.load_any", load)
    monkeypatch.setattr("recur_gpt2.evaluation.comparison.load_any", load)
    (tmp_path / "file").write_text("no folder")
    data = ["--data", str(documents)]
    for nowhere in ("/proc/nowhere/x", str(tmp_path / "file" / "x")):
        for command in (
            ["embed", str(documents), "-o", nowhere],
            ["evaluate", *data, "--json", nowhere],
            ["convert", "--output", nowhere],
            ["generate", "--prompt", "It", "--state-out", nowhere],
            ["finetune", *data, "--output-dir", nowhere],
            ["sweep", *data, "--windows", "64", "--output-dir", nowhere],
        ):
            message = refused(main(command), capsys)
            assert f"{nowhere} cannot be written" in message, command
    for command in (["embed", str(documents), "-o"], ["evaluate", *data, "--json"]):
        assert f"{tmp_path} is a folder" in refused(main([*command, str(tmp_path)]), capsys)


BAD_NUMBERS = {
    "finetune": (
        "seed=-1",
        "lr=inf",
        "transfer_lr=nan",
        "lanes=1180591620717411303424",
        "save_every=0",
        "eval_tokens=1",
    ),
    "evaluate": ("lanes=0", "parallel_windows=-1", "eval_tokens=-5"),
    "convert": ("feature_size=70000", "window=1"),
    "embed": ("batch_tokens=0", "batch_tokens=1180591620717411303424"),
    "generate": ("temperature=0.0", "temperature=nan", "top_k=-1", "top_p=1.5", "repetition_penalty=0.0", "seed=-1"),
    "sweep": ("eval_tokens=-1", "finetune_tokens=1"),
}


@pytest.mark.parametrize(("command", "number"), [(name, each) for name, all in BAD_NUMBERS.items() for each in all])
def test_a_number_that_a_library_would_refuse_is_refused_in_a_sentence(command, number, documents, tmp_path, capsys):
    needed = {
        "finetune": ["--output-dir", tmp_path / "out"],
        "evaluate": [],
        "convert": ["--output", tmp_path / "out"],
        "embed": [documents, "-o", tmp_path / "e.parquet"],
        "generate": ["--prompt", "It"],
        "sweep": ["--output-dir", tmp_path / "out"],
    }
    data = ["--data", documents] if command in ("finetune", "evaluate", "sweep") else []
    name, value = number.split("=")
    words = [command, *needed[command], *data, f"--{name.replace('_', '-')}={value}"]
    assert number in refused(main(list(map(str, words))), capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_there_is_refused_by_every_command(device, tmp_path):
    """--device offers what argparse knows; the API is asked for anything."""
    with pytest.raises(InputError, match=f"device='{device}'"):
        DocumentEmbedder.from_pretrained(str(MODEL), device=device)
    with pytest.raises(InputError, match=f"device='{device}'"):
        checked_device(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_commands_say_in_a_sentence_that_there_is_no_gpu(documents, tmp_path, capsys):
    vectors = str(tmp_path / "e.parquet")
    assert main(["embed", str(documents), "-o", vectors]) == 0
    capsys.readouterr()
    for command in (
        ["embed", str(documents), "-o", str(tmp_path / "f.parquet")],
        ["search", vectors, "--query-file", str(documents / "0.txt")],
        ["evaluate", "--data", str(documents)],
        ["generate", "--prompt", "It"],
        ["finetune", "--data", str(documents), "--output-dir", str(tmp_path / "out")],
        ["sweep", "--data", str(documents), "--output-dir", str(tmp_path / "out")],
    ):
        assert "device='cuda'" in refused(main([*command, "--device", "cuda"]), capsys), command


# ---- which documents -------------------------------------------------------------------------------------------------


def test_evaluate_reads_data_without_splits_whole_and_a_named_split_as_finetune_makes_it(tmp_path, capsys):
    folder = tmp_path / "books"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.txt").write_text(text(60, number) + f" number {number}", encoding="utf-8")
    scores = tmp_path / "scores.json"
    common = ["evaluate", "--data", str(folder), "--protocols", "disjoint", "--window", "16", "--json", str(scores)]
    assert main(common) == 0
    assert "12 documents of" in capsys.readouterr().err
    assert len(json.loads(scores.read_text())["tokens_by_document"]) == 12
    assert main([*common, "--split", "test"]) == 0
    assert "makes 10 train, 1 validation, 1 test of its 12 documents" in capsys.readouterr().err
    assert len(json.loads(scores.read_text())["tokens_by_document"]) == 1
    assert main([*common, "--data", "pg19-sample", "--eval-tokens", "200"]) == 0
    assert len(json.loads(scores.read_text())["tokens_by_document"]) == 18, "the test split that it has"


def test_finetune_says_which_split_it_makes(documents, tmp_path, capsys):
    assert finetune(documents, tmp_path / "out", "--no-control", "--rows") == 0
    assert "makes 4 train, 1 validation, 1 test of its 6 documents" in capsys.readouterr().err


def test_a_protocol_that_cannot_be_scored_is_refused_with_the_true_reason(documents, tmp_path, capsys):
    one = ["evaluate", "--data", str(documents / "0.txt"), "--window", "16", "--last-slots", "4"][:5]
    recurrent = [*one, "--recurrence", "default"]
    said = refused(main([*recurrent, "--protocols", "shuffled"]), capsys)
    assert "there is only 1" in said
    assert "needs a recurrence" in refused(main([*one, "--protocols", "recurrent"]), capsys)
    assert "'sideways' is not known" in refused(main([*one, "--protocols", "sideways"]), capsys)
    for rows, options, why in (
        ("recurrent_shuffled", [], "there is only 1"),
        ("recurrent_zeroed", ["--recurrence", "none", "--last-slots", "0"], "needs a recurrence"),
        ("finetuned_disjoint", ["--no-control"], "--no-control leaves out"),
    ):
        message = refused(finetune(documents, tmp_path / "out", "--rows", rows, *options), capsys)
        assert rows in message
        assert why in message
    assert not (tmp_path / "out").exists()


# ---- what is asked for and what is read ------------------------------------------------------------------------------


def test_the_models_own_attention_may_be_repeated(documents, tmp_path, capsys):
    assert main(["convert", "--window", "16", "--feature-map", "elu", "--output", str(tmp_path / "t2r")]) == 0
    own = ["--model", str(tmp_path / "t2r"), "--no-control", "--rows", "--last-slots", "0", "--attention", "t2r"]
    assert finetune(documents, tmp_path / "out", *own, "--feature-map", "elu", "--recurrence", "none") == 0
    message = refused(finetune(documents, tmp_path / "out2", *own, "--t2r-layers", "75%"), capsys)
    assert "linear_layers" in message


def test_output_that_nobody_reads_any_more_ends_a_command_quietly_with_its_files_written(documents, tmp_path):
    """As `recur-gpt2 generate | head` does."""
    for command, file in (
        (["generate", "--prompt", "It was", "--max-new-tokens", "100000", "--state-out"], "state"),
        (["evaluate", "--data", str(documents), "--protocols", "disjoint", "--json"], "scores.json"),
    ):
        words = [sys.executable, "-m", "recur_gpt2.cli", *command, str(tmp_path / file)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        if file == "state":
            process.stdout.read(5)
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(timeout=120) == 141, errors
        assert "Traceback" not in errors
        assert "BrokenPipe" not in errors
        assert (tmp_path / file).exists()


def test_commands_run_where_python_has_no_resource_module(documents):
    """Windows."""
    script = "import sys, datasets, accelerate; from transformers import GenerationMixin, GPT2LMHeadModel; "
    script += "sys.modules['resource'] = None; "  # which these import where they find it
    script += "from recur_gpt2.cli.main import main; sys.exit(main(sys.argv[1:]))"
    words = ["evaluate", "--data", str(documents), "--protocols", "disjoint", "--window", "16"]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "disjoint" in done.stdout


def test_the_main_job_explains_its_flags():
    shown = subprocess.run([sys.executable, ROOT / "run_pg19.py", "--help"], capture_output=True, text=True, check=True)
    flags = "--window --model --data --recurrence --bptt --steps --lanes --lr --eval-tokens --seed --device --resume"
    assert all(flag in shown.stdout for flag in [*flags.split(), "--output-dir", "--no-control"])
