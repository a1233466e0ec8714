"""What glibc's malloc does with freed memory; nothing is set where the C library has no mallopt.

By default blocks of many megabytes are mapped afresh at each step and their pages zeroed. Kept,
they spare eager page faults (a tenth of a bottleneck unit's time), and our ratios have to hold
against the better eager. A peak, though, is only seen where what was freed is gone.
"""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 2**31 - 1
SMALL = 128 << 10  # glibc's own thresholds, before it adapts them


def keep_freed_memory() -> None:
    """All blocks come from the heap, which never shrinks."""
    _set_thresholds(LARGEST)


def return_freed_memory() -> None:
    """Each block from 128 KiB on is mapped by itself, and unmapped when it is freed."""
    _set_thresholds(SMALL)


def _set_thresholds(size: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, size)
        mallopt(M_TRIM_THRESHOLD, size)
