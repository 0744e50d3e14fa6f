"""The tables of rotary position embedding (SPEC 6.1): every engine's come from here."""

from __future__ import annotations

import math
from decimal import Context, Decimal
from functools import lru_cache
from typing import Any

import numpy as np

from bitskip_ref.config import ModelConfig

TWO_PI = 6.283185307179586
_TWO_PI = Decimal(TWO_PI)
PIECE = 4096  # positions computed at a time, for bounded scratch

# pi / 2 in three parts: products of the first two with integers below 2^20 are exact.
_HALF_PI = (1.5707963267341256, 6.077100506303966e-11, 2.0222662487959506e-21)
_SINE = (-1.0 / 6, 1.0 / 120, -1.0 / 5040, 1.0 / 362880, -1.0 / 39916800, 1.0 / 6227020800)
_COSINE = (-1.0 / 2, 1.0 / 24, -1.0 / 720, 1.0 / 40320, -1.0 / 3628800, 1.0 / 479001600,
           -1.0 / 87178291200)  # fmt: skip


def _frequencies(theta: float, head_dim: int) -> np.ndarray:
    """theta^(-2i/E) as binary64 [E/2]; decimal arithmetic is the same on every machine."""
    context = Context(prec=40)
    log = context.ln(Decimal(theta))
    exponents = [
        context.multiply(log, context.divide(Decimal(-2 * i), Decimal(head_dim)))
        for i in range(head_dim // 2)
    ]
    return np.array([float(context.exp(e)) for e in exponents])


def sine_cosine(angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """sin and cos of binary64 angles within 1e-13, from + - * and rounding only."""
    quadrant = np.rint(angle * (2.0 / np.pi))
    r = angle
    for part in _HALF_PI:
        r = r - quadrant * part
    square = r * r
    sine, cosine = np.zeros_like(r), np.zeros_like(r)
    for c in reversed(_SINE):
        sine = (sine + c) * square
    for c in reversed(_COSINE):
        cosine = (cosine + c) * square
    sine, cosine = r + r * sine, 1.0 + cosine
    q = quadrant.astype(np.int64) & 3
    return (
        np.choose(q, [sine, cosine, -sine, -cosine]),
        np.choose(q, [cosine, -sine, -cosine, sine]),
    )


def scaled(
    f: np.ndarray, kind: str, factor: float, low: float, high: float, original: int
) -> np.ndarray:
    """SPEC 6.6: frequencies f64 [E/2] for a longer context -> f64 [E/2]."""
    if kind == "none":
        return f
    if kind == "linear":
        return f / factor
    turns = (original * f) / TWO_PI
    share = (turns - low) / (high - low)
    between = (1.0 - share) * (f / factor) + share * f
    return np.where(turns > high, f, np.where(turns < low, f / factor, between))


def yarn(
    f: np.ndarray, theta: float, factor: float, fast: float, slow: float, original: int
) -> np.ndarray:
    """SPEC 6.6: frequencies f64 [E/2] for a longer context -> f64 [E/2]."""
    context, width = Context(prec=40), 2 * len(f)
    log = context.ln(Decimal(theta))

    def pair(turns: float) -> float:
        """Which pair turns so often in the original context; decimal, as in `_frequencies`."""
        ratio = context.divide(Decimal(original), context.multiply(Decimal(turns), _TWO_PI))
        return float(context.divide(context.multiply(Decimal(len(f)), context.ln(ratio)), log))

    low, high = max(math.floor(pair(fast)), 0), min(math.ceil(pair(slow)), width - 1)
    span = 0.001 if low == high else float(high - low)
    share = np.clip((np.arange(len(f)) - float(low)) / span, 0.0, 1.0)
    return np.asarray((f / factor) * share + f * (1.0 - share))


def frequency_factors(config: ModelConfig) -> np.ndarray:
    """What frequencies are divided by for a longer context (SPEC 6.6): binary64 [E/2]."""
    c, f = config, _frequencies(config.rope_theta, config.head_dim)
    found = scaled(
        f, c.rope_scaling, c.rope_factor, c.rope_low_freq_factor, c.rope_high_freq_factor,
        c.rope_original_context,
    )  # fmt: skip
    return np.asarray(f / found)


@lru_cache(maxsize=8)
def _table(
    theta: float, head_dim: int, positions: int, attention: float, betas: tuple[float, float],
    *scaling: Any,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    frequencies = _frequencies(theta, head_dim)
    if scaling[0] == "yarn":
        frequencies = yarn(frequencies, theta, scaling[1], *betas, scaling[-1])
    else:
        frequencies = scaled(frequencies, *scaling)
    sine, cosine = (np.empty((positions, head_dim // 2), np.float32) for _ in range(2))
    for start in range(0, positions, PIECE):
        piece = slice(start, min(start + PIECE, positions))
        angle = np.arange(piece.start, piece.stop, dtype=np.float64)[:, None] * frequencies
        both = sine_cosine(angle)
        if attention != 1.0:
            both = both[0] * attention, both[1] * attention
        sine[piece], cosine[piece] = both
    sine.setflags(write=False)
    cosine.setflags(write=False)
    return cosine, sine


def rope_table(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """(cos, sin), each f32 [max_position_embeddings, E/2], read-only: every engine's source."""
    c = config
    return _table(
        c.rope_theta, c.head_dim, c.max_position_embeddings, c.rope_attention_factor,
        (c.rope_beta_fast, c.rope_beta_slow), c.rope_scaling, c.rope_factor,
        c.rope_low_freq_factor, c.rope_high_freq_factor, c.rope_original_context,
    )  # fmt: skip
