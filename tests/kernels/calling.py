"""Calling single kernels from tests: they are compiled only as parts of others."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np


@cache
def compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel as a function of Python; same arguments."""

    @numba.njit(error_model="numpy")
    def caller(*args):  # type: ignore[no-untyped-def]
        return kernel(*args)

    return caller


def at(array: np.ndarray) -> int:
    """Its address; the array must outlive the call."""
    assert array.flags.c_contiguous
    return int(array.ctypes.data)


def call(kernel: Callable[..., Any], *args: Any) -> Any:
    """Compile and call; arrays are passed as addresses."""
    return compiled(kernel)(*(at(a) if isinstance(a, np.ndarray) else a for a in args))


def same_bits(expected: np.ndarray, actual: np.ndarray) -> bool:
    """Equal dtype, shape and bits; signs of zeros count."""
    expected, actual = np.asarray(expected), np.asarray(actual)
    return (
        expected.dtype == actual.dtype
        and expected.shape == actual.shape
        and expected.tobytes() == actual.tobytes()
    )
