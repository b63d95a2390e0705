"""Memory that this process has freed but not given back."""

from __future__ import annotations

import ctypes


def return_freed_memory() -> bool:
    """Give freed memory back to the system, where the C library can (glibc); whether it could.

    Work in many small pieces leaves free space between what is kept, several times the size of the latter.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # musl, macOS, Windows
        return False
    trim(ctypes.c_size_t(0))
    return True
