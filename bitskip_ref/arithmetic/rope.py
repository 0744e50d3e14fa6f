"""Turning queries and keys by their position (SPEC 6.1); the tables are `bitskip_ref.rope`'s."""

from __future__ import annotations

import numpy as np


def apply_rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Half-split rotation. x f32 [T, heads, E]; cos, sin f32 [T, E/2] -> f32 [T, heads, E]."""
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half], x[..., half:]
    c, s = cos[:, None, :], sin[:, None, :]
    return np.concatenate([x1 * c - x2 * s, x2 * c + x1 * s], axis=-1)
