"""glibc's allocator, tuned for training on a CPU. Not for GPUs, whose memory PyTorch manages itself.

By default glibc returns every large tensor to the system when it is freed and takes it back, page by page, when the
next one is made; in CPU training those page faults cost several times the arithmetic. Two remedies, which add up:
freed memory stays in the process, and the heap lies on huge pages.
"""

import ctypes
import os

from .thread_cache import is_glibc

try:
    import resource
except ImportError:  # Windows
    resource = None

M_MXFAST, M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = 1, -1, -2, -4  # malloc.h
MADV_HUGEPAGE = 14  # sys/mman.h
HUGE_PAGE = 2 * 2**20
_tuned = False


def tune_allocator() -> None:
    """Tune this process, as early as possible. Does nothing where the C library is not glibc."""
    if not is_glibc():
        return
    global _tuned
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MXFAST, 0)  # what a tensor is cut out of is joined again at once (thread_cache.py)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # never: the largest number, 2 GB, would cut off the room below
    libc.mallopt(M_TOP_PAD, 2**20 if _is_limited() else 64 * 2**20)
    _put_heap_on_huge_pages(libc)
    _tuned = True


def release_memory() -> None:
    """Give freed memory back to the system, so that a measurement starts from what is in use."""
    if not is_glibc():
        return
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    if _tuned:  # the trim took the heap's room with it
        _put_heap_on_huge_pages(libc)


def _is_limited():
    """Whether the system limits this process's data (ulimit -d)."""
    return resource is not None and resource.getrlimit(resource.RLIMIT_DATA)[0] != resource.RLIM_INFINITY


def _put_heap_on_huge_pages(libc):
    """Let the heap grow over a quarter of the machine's memory, and ask for huge pages there.

    The room is address space only: memory is taken when a page is first written.
    """
    if _is_limited():
        return  # room counts as taken there
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4 // HUGE_PAGE * HUGE_PAGE
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
