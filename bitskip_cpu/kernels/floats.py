"""Float kernels: the same operations in the same order as SPEC sections 2, 3, 4.2, 5 and 7.

Arguments named `*_at` are addresses (see `memory`); lengths count elements. Loops have no
dependence between iterations except where a tree's halves are added, so that LLVM vectorizes them
without being allowed to reassociate: nothing here is compiled with fastmath.
"""

from __future__ import annotations

import math

import numpy as np

from bitskip_cpu.kernels.inner import inner
from bitskip_cpu.kernels.lanes import butterflies
from bitskip_cpu.kernels.layout import LANES
from bitskip_cpu.kernels.memory import floats, halfs, int8s, int32s

f32, i32 = np.float32, np.int32

ZERO, ONE = f32(0.0), f32(1.0)
SCALE_FLOOR = f32(1e-5)
# x + 1.5 * 2^23 - 1.5 * 2^23 rounds to nearest, ties to even, for |x| < 2^22 (SPEC 2.5).
ROUNDER = f32(12582912.0)
EXP_MIN, EXP_MAX = f32(-87.0), f32(88.0)
LOG2_E, LN2_HIGH, LN2_LOW = f32(1.44269504), f32(0.693359375), f32(-2.12194440e-4)
E0, E1, E2 = f32(1.98756915e-4), f32(1.39819995e-3), f32(8.33345191e-3)
E3, E4, E5 = f32(4.16657959e-2), f32(1.66666655e-1), f32(5.00000012e-1)
MAGNITUDE, BIAS, MANTISSA = i32(0x7FFFFFFF), i32(127), i32(23)
HALF_SCALE = f32(2.0**112)  # moves float16's exponent to float32's

SWIGLU, GATED_RELU2, RELU2 = 0, 1, 2


@inner
def power_of_two(n):
    """The smallest power of two not below n >= 1."""
    p = 1
    while p < n:
        p *= 2
    return p


# ---- sums (SPEC 2.2) ----------------------------------------------------------------


@inner
def tree_sum(at, n):
    """Sum of n (a power of two) floats by halving; the memory is used up."""
    while n > 1:
        n >>= 1
        low, high = floats(at, n), floats(at + 4 * n, n)
        for i in range(n):
            low[i] = low[i] + high[i]
    return floats(at, 1)[0]


@inner
def fill_zero(at, n):
    """n zeros."""
    x = floats(at, n)
    for i in range(n):
        x[i] = ZERO


@inner
def copy(source_at, target_at, n):
    """n floats; the two may not overlap."""
    source, target = floats(source_at, n), floats(target_at, n)
    for i in range(n):
        target[i] = source[i]


@inner
def dot_tree(x_at, w_at, n, scratch_at):
    """sum 2.2 of x[i] * w[i] over n floats; scratch holds power_of_two(n) floats (SPEC 4.5)."""
    half = power_of_two(n) >> 1
    buffer = floats(scratch_at, max(half, 1))
    x, w = floats(x_at, n), floats(w_at, n)
    if half == 0:
        return x[0] * w[0]
    x_high, w_high = floats(x_at + 4 * half, n - half), floats(w_at + 4 * half, n - half)
    for i in range(n - half):
        buffer[i] = x[i] * w[i] + x_high[i] * w_high[i]
    for i in range(n - half, half):
        buffer[i] = x[i] * w[i] + ZERO
    return tree_sum(scratch_at, half)


# ---- functions (SPEC 2.6 to 2.8) ----------------------------------------------------


@inner
def exp(x):
    """SPEC 2.6, of one float32."""
    x = x if x > EXP_MIN else EXP_MIN
    x = x if x < EXP_MAX else EXP_MAX
    k = (x * LOG2_E + ROUNDER) - ROUNDER
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    p = ((((E0 * r + E1) * r + E2) * r + E3) * r + E4) * r + E5
    power = i32((i32(k) + BIAS) << MANTISSA).view(f32)
    return ((p * (r * r) + r) + ONE) * power


@inner
def sigmoid(x):
    """SPEC 2.7, of one float32."""
    return ONE / (ONE + exp(-x))


@inner
def relu(x):
    """SPEC 2.8, of one float32."""
    return x if x > ZERO else ZERO


@inner
def relu2(at, n):
    """Squared ReLU in place."""
    x = floats(at, n)
    for i in range(n):
        r = relu(x[i])
        x[i] = r * r


@inner
def ffn_activation(kind, squared, source_at, target_at, n):
    """SPEC 7.1: source holds gate[n] | up[n], or up[n] alone; `squared`: up already is."""
    target = floats(target_at, n)
    if kind == RELU2:
        copy(source_at, target_at, n)
        if not squared:
            relu2(target_at, n)
        return
    gate, up = floats(source_at, n), floats(source_at + 4 * n, n)
    if kind == SWIGLU:
        for i in range(n):
            target[i] = (gate[i] / (ONE + exp(-gate[i]))) * up[i]
    else:
        for i in range(n):
            r = relu(gate[i])
            target[i] = (r * r) * up[i]


@inner
def widen(source_at, target_at, n):
    """float16 bits -> float32, exactly, subnormals included; finite values only."""
    source, target = halfs(source_at, n), int32s(target_at, n)
    for i in range(n):
        h = i32(source[i])
        target[i] = i32((h & i32(0x7FFF)) << i32(13)) | i32((h & i32(0x8000)) << i32(16))
    x = floats(target_at, n)
    for i in range(n):
        x[i] = x[i] * HALF_SCALE


# ---- norms (SPEC 3) -----------------------------------------------------------------


@inner
def _mean_of_squares(x_at, n, scratch_at):
    padded = power_of_two(n)
    x, squares = floats(x_at, n), floats(scratch_at, n)
    for i in range(n):
        squares[i] = x[i] * x[i]
    fill_zero(scratch_at + 4 * n, padded - n)
    return tree_sum(scratch_at, padded) / f32(n)


@inner
def rms_norm(x_at, weight_at, y_at, n, eps, scratch_at):
    """SPEC 3.1; x and y may be the same, scratch holds power_of_two(n) floats."""
    inverse = ONE / f32(math.sqrt(f32(_mean_of_squares(x_at, n, scratch_at) + eps)))
    x, weight, y = floats(x_at, n), floats(weight_at, n), floats(y_at, n)
    for i in range(n):
        y[i] = (x[i] * inverse) * weight[i]


@inner
def layer_norm(x_at, weight_at, y_at, n, eps, scratch_at):
    """SPEC 3.2; the bias follows the weight. x and y may be the same."""
    padded = power_of_two(n)
    copy(x_at, scratch_at, n)
    fill_zero(scratch_at + 4 * n, padded - n)
    mean = tree_sum(scratch_at, padded) / f32(n)
    x, y = floats(x_at, n), floats(y_at, n)
    for i in range(n):
        y[i] = x[i] - mean
    inverse = ONE / f32(math.sqrt(f32(_mean_of_squares(y_at, n, scratch_at) + eps)))
    weight, bias = floats(weight_at, n), floats(weight_at + 4 * n, n)
    for i in range(n):
        y[i] = (y[i] * inverse) * weight[i] + bias[i]


# ---- Hadamard and quantizer (SPEC 5.2, 4.2) -----------------------------------------


@inner
def fwht(at, n):
    """In place, n a power of two."""
    h = n >> 1
    shortest = LANES if n >= LANES else 1
    while h >= shortest:
        for block in range(0, n, 2 * h):
            a, b = floats(at + 4 * block, h), floats(at + 4 * (block + h), h)
            for i in range(h):
                low, high = a[i], b[i]
                a[i] = low + high
                b[i] = low - high
        h >>= 1
    if n >= LANES:
        for block in range(0, n, LANES):
            butterflies(at + 4 * block)
    scale = f32(1.0 / math.sqrt(float(n)))
    x = floats(at, n)
    for i in range(n):
        x[i] = x[i] * scale


@inner
def quantize(x_at, n, largest, codes_at, padded):
    """SPEC 4.2 -> (step, sum of the codes); int8 codes, zeros from n to `padded`."""
    x, bits, codes = floats(x_at, n), int32s(x_at, n), int8s(codes_at, padded)
    top = i32(0)  # bits of floats without a sign order as the floats do
    for i in range(n):
        top = max(top, i32(bits[i] & MAGNITUDE))
    s = i32(top).view(f32)
    s = s if s > SCALE_FLOOR else SCALE_FLOOR
    factor = largest / s
    total = i32(0)
    for i in range(n):
        code = i32((x[i] * factor + ROUNDER) - ROUNDER)
        codes[i] = np.int8(code)
        total = i32(total + code)
    for i in range(n, padded):
        codes[i] = np.int8(0)
    return s / largest, total


# ---- exits (SPEC 8.5) ---------------------------------------------------------------


@inner
def confidence(logits_at, n, scratch_at):
    """-> (largest probability, largest minus second); scratch: power_of_two(n) floats."""
    z, e = floats(logits_at, n), floats(scratch_at, n)
    first, second, at = z[0], ZERO, 0
    for i in range(1, n):
        if z[i] > first:
            first, at = z[i], i
    if n > 1:
        second = z[1 if at == 0 else 0]
        for i in range(n):
            if i != at and z[i] > second:
                second = z[i]
    for i in range(n):
        e[i] = exp(z[i] - first)
    padded = power_of_two(n)
    fill_zero(scratch_at + 4 * n, padded - n)
    total = tree_sum(scratch_at, padded)
    rest = exp(second - first) if n > 1 else ZERO
    return ONE / total, (ONE - rest) / total
