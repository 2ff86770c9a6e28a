"""Starts the commands again with glibc's thread cache off, which glibc reads once, when a process begins.

PyTorch asks for tensors aligned to 64 bytes; glibc cuts each out of a larger piece and keeps the ends in its thread
cache, where they are never joined to their neighbours again: the hole that a tensor leaves does not fit its like, and a
process takes a tenth more memory in training, a quarter more in scoring, and differently much from run to run
(docs/memory_budget.md). Commands alone do so, before anything large is imported; RECUR_GPT2_RESTART=0 says not to.
"""

import os
import platform
import sys

TUNABLES, THREAD_CACHE = "GLIBC_TUNABLES", "glibc.malloc.tcache_count"
RESTART = "RECUR_GPT2_RESTART"  # 0: never; for debuggers, and whatever watches a process from its start


def is_glibc() -> bool:
    """Whether the C library is glibc."""
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


def tuned_environment() -> dict[str, str]:
    """This process's environment, for another one that is to begin without a thread cache, unless it says otherwise."""
    given = os.environ.get(TUNABLES, "")
    if THREAD_CACHE in given or not is_glibc():
        return dict(os.environ)
    return os.environ | {TUNABLES: f"{given}:{THREAD_CACHE}=0".removeprefix(":")}


def restart_tuned() -> None:
    """Begin again in the same process, with the same arguments, if it has not begun so. To be called first of all."""
    environment = tuned_environment()
    if environment != os.environ and sys.executable and os.environ.get(RESTART) != "0":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
