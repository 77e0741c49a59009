"""The C library's memory, told to keep what a training step frees and the next step wants again."""

import ctypes
from contextlib import suppress
from functools import cache

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3), GNU C library


@cache
def keep_freed_memory() -> bool:
    """Let this process keep freed memory; whether the C library could be told so (GNU's can).

    Otherwise it may give the large tensors of every step back to the system, which hands out zeroed
    pages again, one page fault for 4 KiB: up to a quarter of the time of a LeNet5 step on a CPU.
    """
    with suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
    return False
