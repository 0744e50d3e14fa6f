"""Elementary functions from + - * / and rounding alone (SPEC 2.5 to 2.9)."""

from __future__ import annotations

import numpy as np

from bitskip_ref import constants

f32 = np.float32

EXP_MIN, EXP_MAX = f32(constants.EXP_MIN), f32(constants.EXP_MAX)
LOG2_E, SQRT_HALF = f32(constants.LOG2_E), f32(constants.SQRT_HALF)
LN2_HIGH, LN2_LOW = f32(constants.LN2_HIGH), f32(constants.LN2_LOW)
EXP_COEFFICIENTS = tuple(map(f32, constants.EXP_COEFFICIENTS))
LOG_COEFFICIENTS = tuple(map(f32, constants.LOG_COEFFICIENTS))
LARGEST_HALF = f32(constants.LARGEST_HALF)


def exp(x: np.ndarray) -> np.ndarray:
    """SPEC 2.6: e^x within 1.2e-7 relative, x clamped to [-87, 88]. f32 -> f32, same shape."""
    x = np.minimum(np.maximum(np.asarray(x, f32), EXP_MIN), EXP_MAX)
    k = np.rint(x * LOG2_E)
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    p = np.full_like(r, EXP_COEFFICIENTS[0])
    for c in EXP_COEFFICIENTS[1:]:
        p = p * r + c
    return ((p * (r * r) + r) + f32(1.0)) * np.ldexp(f32(1.0), k.astype(np.int32))


def log(x: np.ndarray) -> np.ndarray:
    """SPEC 2.9: the natural logarithm of normal x > 0. f32 -> f32, same shape."""
    m, k = np.frexp(np.asarray(x, f32))
    small = m < SQRT_HALF
    m, k = np.where(small, m + m, m), (k - small).astype(f32)
    r = m - f32(1.0)
    q = r * r
    p = np.full_like(r, LOG_COEFFICIENTS[0])
    for c in LOG_COEFFICIENTS[1:]:
        p = p * r + c
    return (r + (((p * r) * q + k * LN2_LOW) - f32(0.5) * q)) + k * LN2_HIGH


def sigmoid(x: np.ndarray) -> np.ndarray:
    """SPEC 2.7. f32 -> f32 in (0, 1]."""
    return f32(1.0) / (f32(1.0) + exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    """SPEC 2.7: x * sigmoid(x) with one division. f32 -> f32."""
    return x / (f32(1.0) + exp(-x))


def relu(x: np.ndarray) -> np.ndarray:
    """SPEC 2.8. f32 -> f32; both zeros give +0."""
    return np.where(x > 0, x, f32(0.0))


def relu2(x: np.ndarray) -> np.ndarray:
    """SPEC 2.8: the squared ReLU. f32 -> f32."""
    r = relu(x)
    return r * r


def half(x: np.ndarray) -> np.ndarray:
    """SPEC 6.5: what a float16 cache holds of f32, f16 of the same shape."""
    return np.clip(x, -LARGEST_HALF, LARGEST_HALF).astype(np.float16)
