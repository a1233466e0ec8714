"""glibc's malloc as a training process would set it: freed memory is kept for the next step.

By default large blocks are mapped afresh and their pages zeroed at each step. Kept, they cost eager
fewer page faults, and our ratios have to hold against the better eager.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT = 2**31 - 1  # bytes, the largest int
DEFAULT = 128 << 10


def keep_freed_memory() -> None:
    """From now on; does nothing where the C library has no mallopt."""
    _set(M_MMAP_THRESHOLD, KEPT)
    _set(M_TRIM_THRESHOLD, KEPT)


@contextmanager
def default_malloc() -> Iterator[None]:
    """Within, freed memory goes back to the system, so that a peak is that of one step."""
    _set(M_MMAP_THRESHOLD, DEFAULT)
    _set(M_TRIM_THRESHOLD, DEFAULT)
    ctypes.CDLL(None).malloc_trim(0)  # what earlier steps freed
    try:
        yield
    finally:
        keep_freed_memory()


def _set(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(parameter, value)
