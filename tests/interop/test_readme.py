"""README.md's section "With the tools you use": each snippet runs, the programs with fewer steps and tokens."""

import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

SECTION = (ROOT / "README.md").read_text(encoding="utf-8").split("## With the tools you use\n")[1].split("\n## ")[0]
PROGRAMS = [line.strip().split("  ")[0] for line in SECTION.splitlines() if line.startswith("    ")]
SHORTER = {
    "finetune": "--steps 1 --lanes 1 --bptt 1 --window 32 --rows --no-control",
    "evaluate": "--eval-tokens 2000",
    "-m": "--limit 1",
}


@pytest.fixture
def clone(tmp_path):
    """A folder with the bundled data, as a clone has it."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    return tmp_path


def run(arguments, folder):
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL))
def test_code_runs(code, clone):
    run(["-c", code], clone)


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_run(program, clone):
    words = shlex.split(program)
    command = next(word for word in words if word in SHORTER)
    words += SHORTER[command].split()
    if command == "-m":  # a task of its own: the harness's wikitext comes from the hub
        (clone / "page.jsonl").write_text('{"page": "It was a long way to the river."}\n', encoding="utf-8")
        task = "{task: page, dataset_path: json, dataset_kwargs: {data_files: {test: page.jsonl}}, test_split: test, "
        task += "output_type: loglikelihood_rolling, doc_to_text: '', doc_to_target: '{{page}}', "
        task += "metric_list: [{metric: word_perplexity}]}"
        (clone / "page.yaml").write_text(task, encoding="utf-8")
        words = [word.replace("wikitext", "page") for word in words] + ["--include_path", "."]
    run(["-m", "recur_gpt2.cli", *words[1:]] if words[0] == "recur-gpt2" else words[1:], clone)


def test_the_section_is_short():
    assert len(SECTION.splitlines()) <= 30
