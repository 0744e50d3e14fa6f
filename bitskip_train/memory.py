"""Memory that is given back to the system every step costs more than it saves."""

from __future__ import annotations

import ctypes
import os

# Of glibc's malloc.h: parameter -> value.
_SETTINGS = {
    -3: 1 << 30,  # M_MMAP_THRESHOLD: tensors below 1 GiB come from the heap, not from fresh pages
    -1: -1,  # M_TRIM_THRESHOLD: never shrink the heap
    -2: 1 << 26,  # M_TOP_PAD: grow it by 64 MiB
}


def keep_freed_memory() -> bool:
    """Have glibc reuse freed tensors' pages for the next ones; for the whole process.

    Else a step faults in anew much of what it uses. Returns False where nothing was done: another
    C library, or settings of the user's own (MALLOC_... in the environment).
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    return all([mallopt(ctypes.c_int(k), ctypes.c_int(v)) for k, v in _SETTINGS.items()])
