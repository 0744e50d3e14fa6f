"""Arrays that start at a cache line, so that no vector a kernel loads lies across two."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import DTypeLike

LINE = 64  # bytes


def aligned(shape: tuple[int, ...], kind: DTypeLike, *, zeros: bool = True) -> np.ndarray:
    """An array of zeros, or with `zeros=False` of anything; memory is taken when first used."""
    size = math.prod(shape) * np.dtype(kind).itemsize
    raw = (np.zeros if zeros else np.empty)(size + LINE, np.uint8)
    start = -raw.ctypes.data % LINE
    return raw[start : start + size].view(kind).reshape(shape)
