"""Arrays that start at a cache line, so that no vector a kernel loads lies across two.

With BITSKIP_CHECK=1 each lies between canaries: bytes that no kernel may write. `check_canaries`
looks at all of them; the engine asks for it after each call.
"""

from __future__ import annotations

import math
import os
import weakref

import numpy as np
from numpy.typing import DTypeLike

LINE = 64  # bytes
CHECK = os.environ.get("BITSKIP_CHECK", "") not in ("", "0")
GUARD = 4096 if CHECK else 0  # bytes of canaries before and behind each array
CANARY = 0xA5

_CANARIES = bytes([CANARY]) * GUARD
_guarded: dict[int, tuple[weakref.ref[np.ndarray], int]] = {}
"""id of the first -> (an array with its canaries, where what lies between them begins)."""


def aligned(shape: tuple[int, ...], kind: DTypeLike, *, zeros: bool = True) -> np.ndarray:
    """An array of zeros, or with `zeros=False` of anything; memory is taken when first used."""
    size = math.prod(shape) * np.dtype(kind).itemsize
    raw = (np.zeros if zeros else np.empty)(size + LINE + 2 * GUARD, np.uint8)
    start = _start(raw)
    if CHECK:
        raw[:start] = raw[start + size :] = CANARY
        reference = weakref.ref(raw, lambda gone: _guarded.pop(id(gone), None))
        _guarded[id(reference)] = reference, start
    return raw[start : start + size].view(kind).reshape(shape)


def _start(raw: np.ndarray) -> int:
    return GUARD + -(raw.ctypes.data + GUARD) % LINE


def check_canaries() -> None:
    """Raise RuntimeError if something was written before or behind an array of `aligned`."""
    for reference, start in list(_guarded.values()):  # other threads may add and drop arrays
        raw = reference()
        if raw is None:
            continue
        size = len(raw) - LINE - 2 * GUARD
        for where, at in (("before", start - GUARD), ("behind", start + size)):
            if raw[at : at + GUARD].tobytes() != _CANARIES:
                raise RuntimeError(
                    f"a kernel wrote {where} an array of {size} bytes: please report how"
                )
