"""flags.py: a flag for each field of a dataclass, with its default, its choices and its docstring."""

from __future__ import annotations

from argparse import ArgumentParser
from dataclasses import dataclass
from typing import Literal

import pytest

from recur_gpt2.budget.sweep.arguments import SweepArguments
from recur_gpt2.cli.flags import add_flags, settings_of
from recur_gpt2.evaluation.arguments import ComparisonArguments, EvaluationArguments
from recur_gpt2.models.arguments import LinearAttentionOptions
from recur_gpt2.training.arguments import TrainingArguments

ALL = [ComparisonArguments, EvaluationArguments, LinearAttentionOptions, SweepArguments, TrainingArguments]
ELSEWHERE = ("model_options", "training", "control", "budgets", "recurrent")  # no flags, or flags of another kind


@dataclass
class Settings:
    name: str
    """Of what is 100% made."""
    often: int | None = None
    """How often; None: once."""
    rate: float = 3e-5
    """Of it."""
    kind: Literal["soft", "hard"] | None = None
    """GPT-2's."""
    parts: list[int] | None = None
    """Some."""
    loud: bool = False
    """Say so."""


def parse(*words, **options):
    parser = ArgumentParser()
    add_flags(parser, Settings, **options)
    return parser.parse_args(words)


def test_flags_become_settings():
    words = ["--name", "a", "--often", "3", "--kind", "hard", "--parts", "1", "2", "--loud"]
    assert settings_of(Settings, parse(*words), rate=1.0) == Settings("a", 3, 1.0, "hard", [1, 2], True)
    assert settings_of(Settings, parse("--name", "a")) == Settings("a")


def test_what_was_not_given_can_be_told_and_a_command_can_have_defaults_of_its_own():
    assert parse(unset=("rate",), name="b").rate is None
    assert parse(name="b").name == "b"


@pytest.mark.parametrize("words", [[], ["--name", "a", "--kind", "odd"], ["--name", "a", "--often", "x"]], ids=" ".join)
def test_what_is_missing_or_no_choice_is_refused(words, capsys):
    with pytest.raises(SystemExit):
        parse(*words)
    assert "error" in capsys.readouterr().err


def test_help_is_the_docstring_with_the_default(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    said = " ".join(capsys.readouterr().out.split())
    for part in (
        "of what is 100% made",
        "how often (default: once)",
        "of it (default: 3e-05)",
        "GPT-2's",
        "{soft,hard}",
    ):
        assert part in said


@pytest.mark.parametrize("settings", ALL)
def test_every_command_has_the_defaults_of_its_settings(settings):
    parser = ArgumentParser()
    add_flags(parser, settings, leave_out=ELSEWHERE, output_dir=None)
    for name, value in vars(parser.parse_args([])).items():
        assert value == getattr(settings, name, None), name
