"""Sums in a stated order (SPEC 2.2 to 2.4). NumPy's own sums have no order to rely on."""

from __future__ import annotations

import numpy as np


def pad_to_power_of_two(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """Zero-pad one axis to the next power of two (a length that is one already stays)."""
    length = x.shape[axis]
    missing = (1 << (length - 1).bit_length()) - length
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return np.pad(x, widths)


def feature_sum(x: np.ndarray) -> np.ndarray:
    """Sum over the last axis by halving (SPEC 2.2). f32 [..., n] -> f32 [...], n >= 1."""
    x = pad_to_power_of_two(x)
    n = x.shape[-1]
    while n > 1:
        n //= 2
        x = x[..., :n] + x[..., n : 2 * n]
    return x[..., 0]


def position_sum(x: np.ndarray) -> np.ndarray:
    """Sum over the first axis by neighbours, then + 0.0 (SPEC 2.3). f32 [S, ...] -> f32 [...]."""
    x = pad_to_power_of_two(x, axis=0)
    while x.shape[0] > 1:
        x = x[0::2] + x[1::2]
    return x[0] + np.float32(0.0)


def mean(x: np.ndarray) -> np.ndarray:
    """Mean over the last axis (SPEC 2.4). f32 [..., n] -> f32 [...]."""
    return feature_sum(x) / np.float32(x.shape[-1])
