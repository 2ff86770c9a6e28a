"""allocator.py: in a tuned process freed memory stays, so that large tensors cost no new page faults."""

import json
import os
import platform
import subprocess
import sys

import pytest

from recur_gpt2.utils import allocator

PROGRAM = """
import json, resource, sys
import torch
from recur_gpt2.utils import allocator

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def heap():
    ranges = (line.split()[0].split("-") for line in open("/proc/self/maps") if line.endswith("[heap]\\n"))
    return sum(int(end, 16) - int(start, 16) for start, end in ranges)

def work():
    tensors = [torch.ones(size * 2**18) for size in (8, 16, 32)]
    return sum(float(tensor[-1]) for tensor in tensors)

if sys.argv[1] == "tuned":
    allocator.tune_allocator()
room = heap()
for _ in range(8):
    work()
before = faults()
for _ in range(10):
    work()
again = faults() - before
tensor = torch.ones(64 * 2**18)
held = resident()
del tensor
freed = resident()
allocator.release_memory()
print(json.dumps(dict(room=room, again=again, held=held, freed=freed, released=resident())))
"""
MB = 2**20
glibc_only = pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="tunes glibc, which this system has not"
)


def measure(how):
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how],
        env=plain | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def tuned():
    return measure("tuned")


@glibc_only
def test_large_tensors_made_again_cause_almost_no_page_faults(tuned):
    untuned = measure("untuned")
    assert untuned["again"] > 10_000, "else there is nothing to cure here"
    assert tuned["again"] < untuned["again"] / 100


@glibc_only
def test_the_heap_keeps_the_room_that_lies_on_huge_pages(tuned):
    """Address space only: nothing of it is in memory before it is written."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert tuned["room"] > 0.9 * memory / 4
    assert tuned["held"] < 2**30


@glibc_only
def test_freed_memory_stays_until_it_is_released(tuned):
    assert tuned["freed"] > tuned["held"] - 2 * MB
    assert tuned["released"] < tuned["held"] - 60 * MB


@glibc_only
def test_a_limit_on_address_space_does_not_stop_the_process():
    """The heap cannot be given its room on huge pages then, and the process goes on without."""
    program = """
import resource
from recur_gpt2.utils import allocator
resource.setrlimit(resource.RLIMIT_AS, (512 * 2**20, 512 * 2**20))
allocator.tune_allocator()
allocator.release_memory()
print(len(bytearray(50 * 2**20)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, f"{50 * MB}\n"), done.stderr


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(allocator, "is_glibc", lambda: False)
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda *args: pytest.fail("called the C library"))
    allocator.tune_allocator()
    allocator.release_memory()


@pytest.mark.parametrize(
    ("system", "libc"), [("darwin", ""), ("win32", ""), ("linux", "")], ids=["macOS", "Win", "musl"]
)
def test_what_is_not_glibc_is_recognised(system, libc, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "libc_ver", lambda: (libc, ""))
    assert not allocator.is_glibc()
