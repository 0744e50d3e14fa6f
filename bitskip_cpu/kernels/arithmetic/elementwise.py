"""Elementwise arithmetic, trees and norms, operation by operation as in SPEC 2, 3, 4.2, 5 and 7.

Arguments named `*_at` are addresses (see `views`); lengths count elements. Loops have no
dependence between iterations except where a tree's halves are added, so that LLVM vectorizes them
without being allowed to reassociate: nothing here is compiled with fastmath.
"""

from __future__ import annotations

import math

import numpy as np

from bitskip_cpu.kernels.arithmetic.exponential import (
    LN2_HIGH,
    LN2_LOW,
    MANTISSA,
    ONE,
    ROUNDER,
    exp,
    silu_products,
)
from bitskip_cpu.kernels.arithmetic.lanes import (
    RUN,
    add,
    butterfly_lanes,
    butterfly_run,
    halved,
    two_steps,
    weighted_run,
)
from bitskip_cpu.kernels.layout import LANES, RELU2, SWIGLU
from bitskip_cpu.kernels.numba_inside.decorators import kernel
from bitskip_cpu.kernels.numba_inside.views import floats, int8s, int32s
from bitskip_ref import constants

f32, i32 = np.float32, np.int32

ZERO = f32(0.0)
SCALE_FLOOR = f32(constants.SCALE_FLOOR)
L0, L1, L2, L3, L4, L5, L6, L7, L8 = map(f32, constants.LOG_COEFFICIENTS)
ONE_HALF, SQRT_HALF = f32(0.5), f32(constants.SQRT_HALF)
MAGNITUDE, LOWEST = i32(0x7FFFFFFF), i32(-0x80000000)
FRACTION, ONE_HALF_BITS = i32(0x007FFFFF), i32(0x3F000000)  # of a float; of 0.5
LEAST_FLOAT = f32(np.finfo(np.float32).min)
LARGEST_INT8 = f32(127.0)
INFINITY, NAN, INFINITY_BITS = f32(np.inf), f32(np.nan), i32(0x7F800000)


@kernel
def power_of_two(n):
    """The smallest power of two not below n >= 1."""
    p = 1
    while p < n:
        p *= 2
    return p


# ---- sums (SPEC 2.2) ----------------------------------------------------------------


@kernel
def tree_sum(at, n):
    """Sum of n (a power of two) floats by halving; the memory is used up."""
    while n > LANES:
        n >>= 1
        for i in range(0, n, LANES):
            add(at + 4 * i, at + 4 * (n + i), at + 4 * i)
    if n == LANES:
        return halved(at)
    while n > 1:
        n >>= 1
        low, high = floats(at, n), floats(at + 4 * n, n)
        for i in range(n):
            low[i] = low[i] + high[i]
    return floats(at, 1)[0]


@kernel
def fill_zero(at, n):
    """Write n zeros."""
    x = floats(at, n)
    for i in range(n):
        x[i] = ZERO


@kernel
def copy(source_at, target_at, n):
    """Copy n floats; the two may not overlap."""
    source, target = floats(source_at, n), floats(target_at, n)
    for i in range(n):
        target[i] = source[i]


@kernel
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


# ---- functions (SPEC 2.6 to 2.9) ----------------------------------------------------


@kernel
def log(x):
    """SPEC 2.9, of one normal float32 > 0."""
    bits = f32(x).view(i32)
    k = f32((bits >> MANTISSA) - i32(126))
    m = i32((bits & FRACTION) | ONE_HALF_BITS).view(f32)
    if m < SQRT_HALF:
        m, k = m + m, k - ONE
    r = m - ONE
    q = r * r
    p = (((((L0 * r + L1) * r + L2) * r + L3) * r + L4) * r + L5) * r + L6
    p = (p * r + L7) * r + L8
    return (r + (((p * r) * q + k * LN2_LOW) - ONE_HALF * q)) + k * LN2_HIGH


@kernel
def sigmoid(x):
    """SPEC 2.7, of one float32."""
    return ONE / (ONE + exp(-x))


@kernel
def relu(x):
    """SPEC 2.8, of one float32."""
    return x if x > ZERO else ZERO


@kernel
def relu2(at, n):
    """Squared ReLU in place."""
    x = floats(at, n)
    for i in range(n):
        r = relu(x[i])
        x[i] = r * r


@kernel
def ffn_activation(kind, squared, source_at, target_at, n):
    """SPEC 7.1: source holds gate[n] | up[n], or up[n] alone; `squared`: up already is."""
    target = floats(target_at, n)
    if kind == RELU2:
        copy(source_at, target_at, n)
        if not squared:
            relu2(target_at, n)
        return
    if kind == SWIGLU:
        silu_products(source_at, source_at + 4 * n, target_at, n)
    else:
        gate, up = floats(source_at, n), floats(source_at + 4 * n, n)
        for i in range(n):
            r = relu(gate[i])
            target[i] = (r * r) * up[i]


# ---- norms (SPEC 3) -----------------------------------------------------------------


@kernel
def rms_norm(x_at, weight_at, y_at, n, eps, scratch_at):
    """SPEC 3.1; x and y may be the same, scratch holds power_of_two(n) floats."""
    inverse = ONE / f32(math.sqrt(f32(dot_tree(x_at, x_at, n, scratch_at) / f32(n) + eps)))
    x, weight, y = floats(x_at, n), floats(weight_at, n), floats(y_at, n)
    for i in range(n):
        y[i] = (x[i] * inverse) * weight[i]


@kernel
def layer_norm(x_at, weight_at, y_at, n, eps, scratch_at):
    """SPEC 3.2; the bias follows the weight. x and y may be the same."""
    padded = power_of_two(n)
    copy(x_at, scratch_at, n)
    fill_zero(scratch_at + 4 * n, padded - n)
    mean = tree_sum(scratch_at, padded) / f32(n)
    x, y = floats(x_at, n), floats(y_at, n)
    for i in range(n):
        y[i] = x[i] - mean
    inverse = ONE / f32(math.sqrt(f32(dot_tree(y_at, y_at, n, scratch_at) / f32(n) + eps)))
    weight, bias = floats(weight_at, n), floats(weight_at + 4 * n, n)
    for i in range(n):
        y[i] = (y[i] * inverse) * weight[i] + bias[i]


# ---- Hadamard and quantizer (SPEC 5.2, 4.2) -----------------------------------------


@kernel
def fwht(at, n):
    """Transform in place (SPEC 5.2), n a power of two."""
    butterfly(at, at, n)
    multiply(at, f32(1.0 / math.sqrt(float(n))), n)


@kernel
def rotate_unpadded(at, n, m, table_at, scratch_at):
    """SPEC 5.3 in place; m: the odd part of n; table: `hartley(m)`; scratch: n floats."""
    width, factor = n // m, f32(1.0 / math.sqrt(float(n)))
    if m == 1:
        fwht(at, n)
        return
    for j in range(m):
        butterfly(at + 4 * j * width, scratch_at + 4 * j * width, width)
    if width % RUN == 0:
        for i in range(m):
            for k in range(0, width, RUN):
                to = at + 4 * (i * width + k)
                weighted_run(table_at + 4 * i * m, m, scratch_at + 4 * k, 4 * width, factor, to)
        return
    table, first = floats(table_at, m * m), floats(scratch_at, width)
    for i in range(m):
        out = floats(at + 4 * i * width, width)
        c = table[i * m]
        for k in range(width):
            out[k] = c * first[k]
        for j in range(1, m):
            x = floats(scratch_at + 4 * j * width, width)
            c = table[i * m + j]
            for k in range(width):
                out[k] = out[k] + c * x[k]
    multiply(at, factor, n)


@kernel
def multiply(at, factor, n):
    """x = x * factor."""
    x = floats(at, n)
    for i in range(n):
        x[i] = x[i] * factor


@kernel
def butterfly(at, out_at, n):
    """SPEC 5.2 without its scale; the input is used up, the result may lie in its place."""
    h = n  # as far apart as values have yet to meet
    while h >= 4 * RUN:
        for start in range(0, n, h):
            for i in range(start, start + (h >> 2), LANES):
                two_steps(at + 4 * i, h)
        h >>= 2
    most = RUN if n >= RUN else (LANES if n >= LANES else 1)  # what registers do at once
    while h > most:
        h >>= 1
        for start in range(0, n, 2 * h):
            a, b = floats(at + 4 * start, h), floats(at + 4 * (start + h), h)
            for i in range(h):
                low, high = a[i], b[i]
                a[i] = low + high
                b[i] = low - high
    if most == RUN:
        for start in range(0, n, RUN):
            butterfly_run(at + 4 * start, out_at + 4 * start)
    elif most == LANES:
        for start in range(0, n, LANES):
            butterfly_lanes(at + 4 * start, out_at + 4 * start)
    elif out_at != at:
        copy(at, out_at, n)


@kernel
def magnitude_bits(x_at, n):
    """The largest |x| of n floats, as its bits: without a sign they order as floats, NaN on top."""
    bits = int32s(x_at, n)
    top = i32(0)
    for i in range(n):
        top = max(top, i32(bits[i] & MAGNITUDE))
    return top


@kernel
def quantize(x_at, n, largest, codes_at, padded):
    """SPEC 4.2 -> (step, sum of the codes); int8 codes, zeros from n to `padded`."""
    x, codes = floats(x_at, n), int8s(codes_at, padded)
    s = i32(magnitude_bits(x_at, n)).view(f32)
    s = SCALE_FLOOR if s < SCALE_FLOOR else s  # a NaN stays one (SPEC 9.5)
    factor = largest / s
    total = i32(0)
    for i in range(n):
        code = i32((x[i] * factor + ROUNDER) - ROUNDER)
        codes[i] = np.int8(code)
        total = i32(total + code)
    for i in range(n, padded):
        codes[i] = np.int8(0)
    return s / largest, total


@kernel
def integer_rows(x_at, width, codes_at, rows_at, scales_at, rows, y_at):
    """A few rows by SPEC 4.4: f32 x [width] -> f32 y [rows]; rows int8, scales f32 [rows].

    codes: room for int8 [width].
    """
    step, _ = quantize(x_at, width, LARGEST_INT8, codes_at, width)
    codes, scales, y = int8s(codes_at, width), floats(scales_at, rows), floats(y_at, rows)
    for i in range(rows):
        row = int8s(rows_at + i * width, width)
        total = i32(0)
        for j in range(width):
            total = i32(total + i32(codes[j]) * i32(row[j]))
        y[i] = f32(total) * (step * scales[i])


# ---- exits (SPEC 8.5) ---------------------------------------------------------------


@kernel
def two_largest(x_at, n, scratch_at):
    """The largest and the second largest of n floats; scratch: power_of_two(n) floats."""
    if n == 1:
        return floats(x_at, n)[0], LEAST_FLOAT
    half = power_of_two(n) >> 1
    first, second = floats(scratch_at, half), floats(scratch_at + 4 * half, half)
    low, high = floats(x_at, half), floats(x_at + 4 * half, n - half)
    for i in range(n - half):
        a, b = low[i], high[i]
        first[i] = a if a > b else b
        second[i] = b if a > b else a
    at, rest = 4 * (n - half), 2 * half - n
    copy(x_at + at, scratch_at + at, rest)
    second_at = scratch_at + 4 * half
    lowest = floats(second_at + at, rest)
    for i in range(rest):
        lowest[i] = LEAST_FLOAT
    while half > 1:
        half >>= 1
        first_high = floats(scratch_at + 4 * half, half)
        second_high = floats(second_at + 4 * half, half)
        for i in range(half):
            a, b, c, d = first[i], first_high[i], second[i], second_high[i]
            smaller = b if a > b else a
            larger = c if c > d else d
            first[i] = a if a > b else b
            second[i] = smaller if smaller > larger else larger
    return first[0], second[0]


@kernel
def first_of(x_at, n, value):
    """Index of the first of n floats that equals a value; the last if none does."""
    x = floats(x_at, n)
    i = 0
    while i < n - 1 and x[i] != value:
        i += 1
    return i


@kernel
def largest_id(x_at, n):
    """Number of the first of the largest of n floats; -1 if that is no finite number (SPEC 9.5)."""
    bits = int32s(x_at, n)
    top, magnitude = LOWEST, i32(0)
    for i in range(n):
        b = bits[i]
        magnitude = max(magnitude, i32(b & MAGNITUDE))
        top = max(top, i32(b ^ ((b >> 31) & MAGNITUDE)))  # as integers they order as floats
    largest = i32(top ^ ((top >> 31) & MAGNITUDE)).view(f32)
    if magnitude > INFINITY_BITS or abs(largest) == INFINITY:
        return -1
    return first_of(x_at, n, largest)


@kernel
def decides(x_at, n, first):
    """SPEC 9.5: whether the largest of n floats, `first` if none is NaN, is a finite number."""
    return magnitude_bits(x_at, n) <= INFINITY_BITS and abs(first) < INFINITY


@kernel
def confidence(logits_at, n, scratch_at):
    """-> (max, margin, entropy); scratch: power_of_two(n) floats."""
    first, second = two_largest(logits_at, n, scratch_at)
    if not decides(logits_at, n, first):
        return NAN, NAN, NAN
    if n == 1:
        return ONE, ONE, ONE
    # The first addition of both trees is done on the way: their halves share the scratch.
    half = power_of_two(n) >> 1
    e, weighted = floats(scratch_at, half), floats(scratch_at + 4 * half, half)
    low, high = floats(logits_at, half), floats(logits_at + 4 * half, n - half)
    for i in range(n - half):
        a, b = low[i] - first, high[i] - first
        exp_a, exp_b = exp(a), exp(b)
        e[i] = exp_a + exp_b
        weighted[i] = exp_a * a + exp_b * b
    at, rest = 4 * (n - half), 2 * half - n  # arrays from their start: only they are vectorized
    low = floats(logits_at + at, rest)
    e, weighted = floats(scratch_at + at, rest), floats(scratch_at + 4 * half + at, rest)
    for i in range(rest):
        a = low[i] - first
        exp_a = exp(a)
        e[i] = exp_a + ZERO
        weighted[i] = exp_a * a + ZERO
    total = tree_sum(scratch_at, half)
    entropy = log(total) - tree_sum(scratch_at + 4 * half, half) / total
    margin = (ONE - exp(second - first)) / total
    return ONE / total, margin, ONE - entropy / log(f32(n))
