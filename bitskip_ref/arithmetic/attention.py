"""Causal grouped-query attention over cached keys and values (SPEC 6.2, 6.3)."""

from __future__ import annotations

import math

import numpy as np

from bitskip_ref.arithmetic.functions import exp
from bitskip_ref.arithmetic.sums import feature_sum, position_sum


def attention(q: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """q f32 [T, H, E] of the last T positions; keys, values f32 [S, K, E] -> f32 [T, H * E]."""
    tokens, heads, head_dim = q.shape
    past = keys.shape[0] - tokens
    group = heads // keys.shape[1]
    scale = np.float32(1.0 / math.sqrt(head_dim))
    out = np.empty_like(q)
    for t in range(tokens):
        seen = past + t + 1
        for h in range(heads):
            k, v = keys[:seen, h // group], values[:seen, h // group]
            scores = feature_sum(q[t, h] * k) * scale  # [seen]
            e = exp(scores - scores.max())
            out[t, h] = position_sum(e[:, None] * v) / position_sum(e)
    return out.reshape(tokens, heads * head_dim)
