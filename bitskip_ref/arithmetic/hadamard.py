"""The fast Walsh-Hadamard transform, and what it is for any width (SPEC section 5)."""

from __future__ import annotations

import math

import numpy as np

from bitskip_ref.arithmetic.sums import pad_to_power_of_two
from bitskip_ref.config import odd_part
from bitskip_ref.hartley import hartley


def fwht(x: np.ndarray) -> np.ndarray:
    """SPEC 5.2, orthonormal, natural order. f32 [..., n], n a power of two -> f32 [..., n]."""
    n = x.shape[-1]
    if n & (n - 1):
        raise ValueError(f"fwht: length {n} is not a power of two; pad first (SPEC 5.1)")
    return butterflies(x) * np.float32(1.0 / math.sqrt(n))


def butterflies(x: np.ndarray) -> np.ndarray:
    """SPEC 5.2 without its scale. f32 [..., n], n a power of two -> f32 [..., n]."""
    n = x.shape[-1]
    h = n // 2
    while h:
        pairs = x.reshape(*x.shape[:-1], n // (2 * h), 2, h)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = np.stack([a + b, a - b], axis=-2).reshape(x.shape)
        h //= 2
    return x


def rotate(x: np.ndarray) -> np.ndarray:
    """SPEC 5.1: zero-pad to a power of two, then transform. f32 [..., n] -> f32 [..., 2^m]."""
    return fwht(pad_to_power_of_two(x))


def rotate_unpadded(x: np.ndarray) -> np.ndarray:
    """SPEC 5.3: f32 [..., n] of any n -> f32 [..., n]. But for rounding it is its own inverse."""
    n = x.shape[-1]
    m = odd_part(n)
    rows = butterflies(x.reshape(*x.shape[:-1], m, n // m))
    if m > 1:
        table = hartley(m)
        total = table[:, 0, None] * rows[..., None, 0, :]
        for j in range(1, m):
            total = total + table[:, j, None] * rows[..., None, j, :]
        rows = total
    return rows.reshape(x.shape) * np.float32(1.0 / math.sqrt(n))
