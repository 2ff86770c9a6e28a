"""glibc's allocator, tuned for training on a CPU. Not for GPUs, whose memory PyTorch manages itself.

By default glibc returns every large tensor to the system when it is freed and takes it back, page by page, when the
next one is made; in CPU training those page faults cost several times the arithmetic. Two remedies, which add up:
freed memory stays in the process, and the heap lies on huge pages.
"""

import ctypes
import os
import platform
import resource
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
MADV_HUGEPAGE = 14  # sys/mman.h
HUGE_PAGE = 2 * 2**20
_tuned = False


def tune_allocator() -> None:
    """Tune this process, as early as possible. Does nothing where the C library is not glibc."""
    if not _is_glibc():
        return
    global _tuned
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # never: the largest number, 2 GB, would cut off the room below
    libc.mallopt(M_TOP_PAD, 64 * 2**20 if _allowed() is None else 2**20)  # room that a limit would count as taken
    _put_heap_on_huge_pages(libc)
    _tuned = True


def release_memory() -> None:
    """Give freed memory back to the system, so that a measurement starts from what is in use."""
    if not _is_glibc():
        return
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    if _tuned:  # the trim took the heap's room with it
        _put_heap_on_huge_pages(libc)


def _allowed():
    """Bytes that a limit on the process's data (ulimit -d) leaves; None without one."""
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if limit == resource.RLIM_INFINITY:
        return None
    with open("/proc/self/status") as status:
        used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))
    return max(0, limit - used)


def _is_glibc():
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


def _put_heap_on_huge_pages(libc):
    """Let the heap grow over a quarter of the machine's memory, and ask for huge pages there.

    The room is address space only: memory is taken when a page is first written.
    """
    size, allowed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4, _allowed()
    if allowed is not None:
        size = min(size, allowed - allowed // 8)  # the rest is for what lies beside the heap
    size = size // HUGE_PAGE * HUGE_PAGE
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    room = libc.malloc(size)
    if not room:
        return  # a limit on address space: go on without
    start = -(-room // HUGE_PAGE) * HUGE_PAGE
    libc.madvise(start, room + size - start, MADV_HUGEPAGE)
    libc.free(room)
