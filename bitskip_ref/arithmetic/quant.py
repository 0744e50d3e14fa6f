"""Quantizers and the linear layers on their codes (SPEC section 4)."""

from __future__ import annotations

import numpy as np

from bitskip_ref import constants
from bitskip_ref.arithmetic.sums import feature_sum
from bitskip_ref.floats import widened

f32 = np.float32
SCALE_FLOOR = f32(constants.SCALE_FLOOR)


def quantize_weights(w: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """SPEC 4.1. f32 [out, in] -> (codes int8 [out, in] in -1..1, alpha f32 > 0)."""
    total = feature_sum(feature_sum(np.abs(w)))
    alpha = np.maximum(total / f32(w.size), SCALE_FLOOR)
    half = f32(0.5) * alpha
    codes = (w > half).astype(np.int8) - (w < -half).astype(np.int8)
    return codes, f32(alpha)


def quantize_activations(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """SPEC 4.2 over the last axis. f32 [..., n] -> (codes int8 [..., n], step f32 [..., 1]).

    Codes lie in -127..127 for 8 bits and -7..7 for 4; `codes * step` is the value.
    """
    largest = f32(2 ** (bits - 1) - 1)
    s = np.maximum(np.max(np.abs(x), axis=-1, keepdims=True), SCALE_FLOOR)
    codes = np.rint(x * (largest / s)).astype(np.int8)
    return codes, s / largest


def integer_product(codes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Exact sums of int8 products. [..., in] x [out, in] -> int32 [..., out]."""
    return codes.astype(np.int32) @ weights.astype(np.int32).T


def ternary_linear(
    x: np.ndarray, weights: np.ndarray, alpha: np.float32, activation_bits: int
) -> np.ndarray:
    """SPEC 4.2 and 4.3. x f32 [..., in], weights int8 [out, in] in -1..1 -> f32 [..., out]."""
    codes, step = quantize_activations(x, activation_bits)
    return integer_product(codes, weights).astype(f32) * (step * alpha)


def int8_linear(x: np.ndarray, weights: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """SPEC 4.4. x f32 [..., in], weights int8 [out, in], scales f32 [out] -> f32 [..., out]."""
    codes, step = quantize_activations(x, 8)
    return integer_product(codes, weights).astype(f32) * (step * scales)


def float_linear(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """SPEC 4.5. x f32 [..., in], weights f32, f16 or BFLOAT16 [out, in] -> f32 [..., out]."""
    w = widened(weights)
    rows = [feature_sum(row * w) for row in x.reshape(-1, x.shape[-1])]
    return np.stack(rows).reshape(*x.shape[:-1], w.shape[0])
