"""RMS and layer norm over the last axis (SPEC section 3)."""

from __future__ import annotations

import numpy as np

from bitskip_ref.arithmetic.sums import mean

f32 = np.float32


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """SPEC 3.1. f32 [..., n], weight f32 [n] -> f32 [..., n]."""
    inverse = f32(1.0) / np.sqrt(mean(x * x) + f32(eps))
    return (x * inverse[..., None]) * weight


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    """SPEC 3.2. f32 [..., n], weight and bias f32 [n] -> f32 [..., n]."""
    centred = x - mean(x)[..., None]
    inverse = f32(1.0) / np.sqrt(mean(centred * centred) + f32(eps))
    return (centred * inverse[..., None]) * weight + bias
