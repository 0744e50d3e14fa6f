"""Causal grouped-query attention over cached keys and values (SPEC 6.2, 6.3, 6.8)."""

from __future__ import annotations

import math

import numpy as np

from bitskip_ref import constants
from bitskip_ref.arithmetic.functions import exp
from bitskip_ref.arithmetic.quant import quantize_activations
from bitskip_ref.arithmetic.sums import feature_sum, position_sum

f32 = np.float32
LARGEST_WEIGHT, SOFTMAX_UNIT = f32(constants.LARGEST_WEIGHT), f32(constants.SOFTMAX_UNIT)


def attention(q: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """q f32 [T, H, E] of the last T positions; keys, values f32 [S, K, E] -> f32 [T, H * E]."""
    tokens, heads, head_dim = q.shape
    past = keys.shape[0] - tokens
    group = heads // keys.shape[1]
    scale = f32(1.0 / math.sqrt(head_dim))
    out = np.empty_like(q)
    for t in range(tokens):
        seen = past + t + 1
        for h in range(heads):
            k, v = keys[:seen, h // group], values[:seen, h // group]
            scores = feature_sum(q[t, h] * k) * scale  # [seen]
            e = exp(scores - scores.max())
            out[t, h] = position_sum(e[:, None] * v) / position_sum(e)
    return out.reshape(tokens, heads * head_dim)


def int8_attention(
    q: np.ndarray, keys: np.ndarray, key_steps: np.ndarray, values: np.ndarray,
    value_steps: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """SPEC 6.8: the same over codes int8 [S, K, E] in -127..127 and their steps f32 [S, K, 1]."""
    tokens, heads, head_dim = q.shape
    past = keys.shape[0] - tokens
    group = heads // keys.shape[1]
    codes, steps = quantize_activations(q, 8)
    steps = steps * f32(1.0 / math.sqrt(head_dim))
    out = np.empty_like(q)
    for t in range(tokens):
        for h in range(heads):
            seen = slice(past + t + 1), h // group
            products = keys[seen].astype(np.int32) @ codes[t, h].astype(np.int32)  # [seen]
            scores = products.astype(f32) * (steps[t, h] * key_steps[seen][:, 0])
            e = exp(scores - scores.max())
            weights = e * value_steps[seen][:, 0]
            largest = weights.max()
            weights = np.rint(weights * (LARGEST_WEIGHT / largest)).astype(np.int64)
            total = np.rint(e * SOFTMAX_UNIT).astype(np.int64).sum()
            sums = (weights @ values[seen].astype(np.int64)).astype(f32)  # [E]
            out[t, h] = sums * ((largest / LARGEST_WEIGHT) / (f32(total) / SOFTMAX_UNIT))
    return out.reshape(tokens, heads * head_dim)
