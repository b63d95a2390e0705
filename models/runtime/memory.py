"""Return of freed heap memory to the operating system."""

from __future__ import annotations

import ctypes


def return_freed_memory() -> bool:
    """Return freed heap memory to the operating system (glibc only); the result is whether that is possible.

    Many small allocations fragment the heap: the free space between live blocks reaches several times their size.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # musl, macOS, Windows
        return False
    trim(ctypes.c_size_t(0))
    return True
