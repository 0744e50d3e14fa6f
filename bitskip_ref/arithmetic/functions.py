"""Elementary functions from + - * / and rounding alone (SPEC 2.5 to 2.9)."""

from __future__ import annotations

import numpy as np

from bitskip_ref.cache import LARGEST_HALF

f32 = np.float32

EXP_MIN, EXP_MAX = f32(-87.0), f32(88.0)
LOG2_E = f32(1.44269504)
LN2_HIGH, LN2_LOW = f32(0.693359375), f32(-2.12194440e-4)
EXP_COEFFICIENTS = tuple(
    f32(c)
    for c in (
        1.98756915e-4, 1.39819995e-3, 8.33345191e-3, 4.16657959e-2, 1.66666655e-1, 5.00000012e-1,
    )
)  # fmt: skip

SQRT_HALF = f32(0.707106781)
LOG_COEFFICIENTS = tuple(
    f32(c)
    for c in (
        7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
        -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
    )
)  # fmt: skip


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
    return np.clip(x, f32(-LARGEST_HALF), f32(LARGEST_HALF)).astype(np.float16)
