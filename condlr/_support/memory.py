"""Settings of the C library's memory allocation."""

import ctypes
from contextlib import suppress
from functools import cache

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3), GNU C library


@cache
def keep_freed_memory() -> bool:
    """Make this process keep freed memory; return whether the C library supports that (GNU's does).

    Otherwise it may return the large tensors of every step to the system, and get zeroed pages back with one
    page fault for every 4 KiB. That takes up to a quarter of the time of a LeNet5 step on a CPU.
    """
    with suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
    return False
