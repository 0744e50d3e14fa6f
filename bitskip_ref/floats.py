"""How floats of an embedding or a head are stored: float32, float16 or bfloat16 (SPEC 4.5).

NumPy has no bfloat16: an array of uint16 holds its bits, the upper half of a float32's.
"""

from __future__ import annotations

import numpy as np

BFLOAT16 = np.uint16
PIECE = 1 << 18  # numbers looked at in one go: scratch does not grow with a file
INFINITE = 0x7F80  # the exponent's bits of a bfloat16 that is infinite or NaN
LARGEST = {np.float16: ("float16", 65504.0), BFLOAT16: ("bfloat16", 255 * 2.0**120)}


def stored(x: np.ndarray, kind: type) -> np.ndarray:
    """f32, finite -> the same shape of float32, float16 or BFLOAT16, rounded to nearest even.

    Raises ValueError for a magnitude above the largest of that kind.
    """
    if kind in LARGEST:
        name, largest = LARGEST[kind]
        if x.size and np.abs(x).max() > np.float32(largest):
            raise ValueError(f"exceeds {name} ({largest:g})")
    if kind is not BFLOAT16:
        return x.astype(kind)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(BFLOAT16)


def widened(x: np.ndarray) -> np.ndarray:
    """Floats as `stored` gives them, or integers of less than 16 bits -> the same numbers, f32."""
    if x.dtype != BFLOAT16:
        return x.astype(np.float32)
    return (x.astype(np.uint32) << 16).view(np.float32)


def all_finite(x: np.ndarray) -> bool:
    """Whether floats as `stored` gives them are all finite."""
    flat = x.reshape(-1)
    parts = (flat[i : i + PIECE] for i in range(0, flat.size, PIECE))
    if x.dtype != BFLOAT16:
        return all(np.isfinite(part).all() for part in parts)
    return all(((part & INFINITE) != INFINITE).all() for part in parts)


def dtype_name(kind: type | np.dtype) -> str:
    """NumPy's name of a dtype that a tensor of a model has, or bfloat16."""
    return "bfloat16" if kind == BFLOAT16 else str(np.dtype(kind))
