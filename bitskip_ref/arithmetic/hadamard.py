"""The fast Walsh-Hadamard transform (SPEC section 5)."""

from __future__ import annotations

import math

import numpy as np

from bitskip_ref.arithmetic.sums import pad_to_power_of_two


def fwht(x: np.ndarray) -> np.ndarray:
    """SPEC 5.2, orthonormal, natural order. f32 [..., n], n a power of two -> f32 [..., n]."""
    n = x.shape[-1]
    if n & (n - 1):
        raise ValueError(f"fwht: length {n} is not a power of two; pad first (SPEC 5.1)")
    h = n // 2
    while h:
        pairs = x.reshape(*x.shape[:-1], n // (2 * h), 2, h)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = np.stack([a + b, a - b], axis=-2).reshape(x.shape)
        h //= 2
    return x * np.float32(1.0 / math.sqrt(n))


def rotate(x: np.ndarray) -> np.ndarray:
    """SPEC 5.1: zero-pad to a power of two, then transform. f32 [..., n] -> f32 [..., 2^m]."""
    return fwht(pad_to_power_of_two(x))
