"""The package as it is imported: quickly, with its classes known to transformers in whichever order."""

import subprocess
import sys

import pytest
from conftest import ROOT

MODEL = "data/recur-gpt2-mini"
LOAD = f"print(type(AutoModelForCausalLM.from_pretrained('{MODEL}')).__name__)"
CONFIGURE = f"print(type(AutoConfig.from_pretrained('{MODEL}')).__name__)"


def run(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import recur_gpt2; from transformers import AutoConfig, AutoModelForCausalLM",
        "import recur_gpt2; from transformers import AutoModelForCausalLM, AutoConfig",
        "import transformers, recur_gpt2; from transformers import AutoConfig, AutoModelForCausalLM",
        "from transformers import AutoConfig; import recur_gpt2; from transformers import AutoModelForCausalLM",
        "from transformers import AutoConfig, AutoModelForCausalLM; import recur_gpt2",
        "from recur_gpt2 import RecurGPT2Config; from transformers import AutoConfig, AutoModelForCausalLM",
        "from recur_gpt2 import RecurState; from transformers import AutoConfig, AutoModelForCausalLM",
        "from transformers import GPT2LMHeadModel, AutoConfig, AutoModelForCausalLM; import recur_gpt2",
        "import recur_gpt2; from transformers import GPT2Config, AutoConfig, AutoModelForCausalLM",
        "import recur_gpt2; from transformers import GPT2LMHeadModel, AutoConfig, AutoModelForCausalLM",
        "import recur_gpt2.models.configuration; from transformers import AutoConfig, AutoModelForCausalLM",
    ],
)
def test_auto_classes_know_ours_whatever_is_imported_first(imports):
    assert run(f"{imports}; {CONFIGURE}; {LOAD}") == ["RecurGPT2Config", "RecurGPT2LMHeadModel"]


def test_the_package_and_the_command_line_are_imported_without_what_takes_seconds():
    heavy = "print(*[name for name in ('torch', 'transformers', 'datasets', 'numpy') if name in sys.modules])"
    assert run(f"import sys, recur_gpt2, recur_gpt2.cli.main; {heavy}") == []
    wrong = "import sys; from recur_gpt2.cli.main import main\ntry: main(['evaluate', '--lanes', 'x'])\n"
    assert run(f"{wrong}except SystemExit: {heavy}") == []


def test_public_names_are_listed_and_others_are_refused():
    import recur_gpt2

    assert set(recur_gpt2.__all__) <= set(dir(recur_gpt2))
    assert all(getattr(recur_gpt2, name) is not None for name in recur_gpt2.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Recur'"):
        _ = recur_gpt2.Recur
