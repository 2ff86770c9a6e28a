"""thread_cache.py: commands begin without glibc's thread cache, once, with the same arguments."""

import os
import platform
import subprocess
import sys

import pytest
from conftest import ROOT

from recur_gpt2.utils.thread_cache import THREAD_CACHE, TUNABLES, tuned_environment

glibc_only = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tunes glibc, which this system has not")
PROGRAM = """
import os, sys
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[1:], "torch" in sys.modules, flush=True)
from recur_gpt2.utils.thread_cache import restart_tuned
restart_tuned()
"""


@glibc_only
@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (None, f"{THREAD_CACHE}=0"),
        ("", f"{THREAD_CACHE}=0"),
        ("glibc.malloc.hugetlb=1", f"glibc.malloc.hugetlb=1:{THREAD_CACHE}=0"),
        (f"{THREAD_CACHE}=3", f"{THREAD_CACHE}=3"),
    ],
)
def test_the_thread_cache_is_off_unless_the_user_says_otherwise(given, wanted, monkeypatch):
    monkeypatch.delenv(TUNABLES, raising=False)
    if given is not None:
        monkeypatch.setenv(TUNABLES, given)
    before = dict(os.environ)
    assert tuned_environment() == before | {TUNABLES: wanted}
    assert dict(os.environ) == before


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.delenv(TUNABLES, raising=False)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert tuned_environment() == dict(os.environ)


@glibc_only
def test_a_command_begins_again_once_as_the_same_process_with_the_same_arguments():
    environment = {name: value for name, value in os.environ.items() if name != TUNABLES}
    command = [sys.executable, "-c", PROGRAM, "--text", "two words"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    (first, *before), (second, *after) = (line.split(" ", 2) for line in done.stdout.splitlines())
    assert first == second
    arguments = "['--text', 'two words'] False"
    assert (before, after) == (["None", arguments], [f"{THREAD_CACHE}=0", arguments])


@glibc_only
@pytest.mark.parametrize("program", ['run_path("run_pg19.py"', 'run_module("recur_gpt2.cli"'])
def test_commands_begin_again_before_anything_large_is_imported(program):
    """In place of the second beginning stands a line that says with what it would have been."""
    environment = {name: value for name, value in os.environ.items() if name != TUNABLES}
    watch = f"""
import os, runpy, sys
def begin(path, arguments, environment):
    print("begins again", environment["{TUNABLES}"], "torch" in sys.modules)
    sys.exit()
os.execve = begin
runpy.{program}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", watch], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.stdout == f"begins again {THREAD_CACHE}=0 False\n", done.stderr


@glibc_only
def test_a_variable_keeps_commands_from_beginning_again():
    environment = {name: value for name, value in os.environ.items() if name != TUNABLES} | {"RECUR_GPT2_RESTART": "0"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    assert len(done.stdout.splitlines()) == 1
