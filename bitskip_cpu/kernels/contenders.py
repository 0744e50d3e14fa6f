"""Logits that may be chosen, from the upper bits of all rows and all bits of a few (SPEC 9.6).

A row's code is c = 16 u + l: u its upper 4 bits, l its lower ones. With activation codes x,
    2 sum(c x) = 32 sum(u x) + 15 sum(x) + sum((2 l - 15) x),
and by Cauchy and Schwarz the last sum is at most |2 l - 15| |x|: two norms, of which the first is
stored with the row. All else being exact, and f32 conversion and products with a scale
that is not negative rising with their argument, this bounds the logit of SPEC 4.4 itself. A row
whose bound lies below what is known to be reached cannot be chosen.
"""

from __future__ import annotations

import math

import numpy as np

from bitskip_cpu.kernels.arithmetic.elementwise import INFINITY, copy, first_of
from bitskip_cpu.kernels.arithmetic.lanes import larger, largest
from bitskip_cpu.kernels.layout import ACC_STRIDE, BAND, INT4, LANES
from bitskip_cpu.kernels.numba_inside.atomics import fetch_scattered
from bitskip_cpu.kernels.numba_inside.decorators import kernel
from bitskip_cpu.kernels.numba_inside.views import floats, int8s, int32s
from bitskip_cpu.kernels.products.rows import IN_HALVES, apart_from, integer_sums, row_sum
from bitskip_cpu.kernels.products.ternary_layout import LINE
from bitskip_cpu.kernels.products.vocab_layout import OFFSET, ROUND_UP

f32, i32 = np.float32, np.int32
OFFSET4 = i32(OFFSET[4])
ONE, SPARE = f32(1.0), f32(1e-6)
AHEAD = 4  # rows that are asked for before they are wanted: each lies in a page of its own


@kernel
def norms_of_codes(s):
    """|x| of every token's codes, rounded up."""
    norms = floats(s.code_norms, s.tokens)
    for t in range(s.tokens):
        codes, total = int8s(s.codes + t * s.codes_stride, s.hidden), i32(0)
        for i in range(s.hidden):
            total = i32(total + i32(i32(codes[i]) * i32(codes[i])))
        norms[t] = f32(math.sqrt(f32(total))) * ROUND_UP


@kernel
def bound_rows(s, first, last, acc_at):
    """Upper bounds of logits first..last-1 over the temperature, in their places, per token.

    And of those apart from them, if the part has such.
    """
    for start in range(first, last, BAND):
        stop = min(start + BAND, last)
        ask_beside(s, start + BAND)
        if IN_HALVES and s.apart:
            ask_beside(s, start + s.apart + BAND)
        integer_sums(s, INT4, s.upper_weights, s.upper_row_bytes, s.hidden, start, stop, acc_at)
        bound_band(s, start, stop, acc_at)
        if IN_HALVES and s.apart:
            other, other_stop = apart_from(s, start, stop)
            if other < other_stop:
                bound_band(s, other, other_stop, acc_at + ACC_STRIDE)


@kernel
def ask_beside(s, start):
    """Ask for what lies beside the tiles of a band, before it is reached."""
    for array in (s.vocab_scale, s.upper_norms, s.logits):
        fetch_scattered(array + 4 * start, 4 * BAND // LINE)


@kernel
def bound_band(s, start, stop, acc_at):
    """Upper bounds of a band of logits, from the sums of their upper bits, and the largest."""
    steps, sums = floats(s.steps, s.tokens), int32s(s.sums, s.tokens)
    norms, n = floats(s.code_norms, s.tokens), stop - start
    scale, lower = floats(s.vocab_scale + 4 * start, n), floats(s.upper_norms + 4 * start, n)
    for t in range(s.tokens):
        step, norm = steps[t], norms[t]
        total, middle = i32(OFFSET4 * sums[t]), i32(i32(i32(15) * sums[t]) + 1)
        z = floats(s.logits + 4 * (t * s.vocab + start), n)
        acc = int32s(acc_at + t * ACC_STRIDE, n)
        for i in range(n):
            known = i32(i32(i32(acc[i] - total) << i32(5)) + middle)
            z[i] = f32(i32(i32(known + i32(lower[i] * norm)) >> 1)) * (step * scale[i])
        if s.contender_temperature != ONE:
            for i in range(n):
                z[i] = z[i] / s.contender_temperature
        z_at = s.logits + 4 * (t * s.vocab + start)
        largest_bounds = floats(s.band_bounds + 4 * t * bands(s), bands(s))
        largest_bounds[start // BAND] = largest_of(z_at, n, acc_at + t * ACC_STRIDE)


@kernel
def bands(s):
    """How many bands of rows there are."""
    return (s.vocab + BAND - 1) // BAND


@kernel
def largest_of(x_at, n, room_at):
    """The largest of n floats; `room`: LANES floats."""
    x, whole, most = floats(x_at, n), n // LANES * LANES, -INFINITY
    for i in range(whole, n):
        most = max(most, x[i])
    if whole:
        copy(x_at, room_at, LANES)
        for i in range(LANES, whole, LANES):
            larger(room_at, x_at + 4 * i, room_at)
        most = max(most, largest(room_at))
    return most


@kernel
def row_of_largest(s, t):
    """The row with token t's largest bound."""
    count, band = bands(s), 0
    largest_bounds = floats(s.band_bounds + 4 * t * count, count)
    for b in range(count):
        if largest_bounds[b] > largest_bounds[band]:
            band = b
    start = band * BAND
    z_at, n = s.logits + 4 * (t * s.vocab + start), min(BAND, s.vocab - start)
    return start + first_of(z_at, n, largest_bounds[band])


@kernel
def logit(s, t, row):
    """Token t's logit of one row (SPEC 4.4)."""
    total = row_sum(s.head_codes + row * s.hidden, s.codes + t * s.codes_stride, s.hidden)
    return f32(total) * (floats(s.steps, s.tokens)[t] * floats(s.vocab_scale, s.vocab)[row])


@kernel
def find_least(s):
    """Per token, what a contender reaches at least: from the logits whose bounds are largest."""
    least = floats(s.least_contenders, s.tokens)
    for t in range(s.tokens):
        z_at, count = s.logits + 4 * t * s.vocab, min(s.contender_count, s.vocab)
        if count == 1:
            lowest = logit(s, t, row_of_largest(s, t)) / s.contender_temperature
        else:
            lowest, rows = INFINITY, int32s(s.scratch, count)
            largest_rows(z_at, s.vocab, count, rows)
            for i in range(count):
                lowest = min(lowest, logit(s, t, rows[i]) / s.contender_temperature)
        least[t] = lowest
        if s.contender_reach > 0:
            least[t] = lowest - (s.contender_reach + abs(lowest) * SPARE)


@kernel
def largest_rows(z_at, n, count, rows):
    """Numbers of the `count` largest of n floats; int32 [count]."""
    z = floats(z_at, n)
    for i in range(n):
        if i >= count and not z[i] > z[rows[count - 1]]:
            continue
        at = min(i, count - 1)
        while at > 0 and z[i] > z[rows[at - 1]]:
            rows[at] = rows[at - 1]
            at -= 1
        rows[at] = i


@kernel
def settle_rows(s, first, last, scratch_at):
    """Logits first..last-1 of what may reach enough, -inf for what cannot, from their bounds."""
    rows = int32s(scratch_at, last - first + 1)
    for t in range(s.tokens):
        least = floats(s.least_contenders, s.tokens)[t]
        z, found = floats(s.logits + 4 * t * s.vocab, s.vocab), 0
        for start in range(first, last, BAND):
            stop, some = min(start + BAND, last), i32(0)
            for i in range(start, stop):
                some = i32(some + i32(not z[i] < least))  # a NaN is not excluded
            if some:
                for i in range(start, stop):
                    rows[found] = i
                    found += 0 if z[i] < least else 1
            for i in range(start, stop):
                z[i] = -INFINITY
        for j in range(-AHEAD, found):
            if j + AHEAD < found:
                fetch_scattered(s.head_codes + rows[j + AHEAD] * s.hidden, s.hidden // LINE)
            if j >= 0:
                z[rows[j]] = logit(s, t, rows[j])


@kernel
def count_found(s):
    """How many logits were settled, on average over the tokens."""
    found = 0
    for t in range(s.tokens):
        z = floats(s.logits + 4 * t * s.vocab, s.vocab)
        for i in range(s.vocab):
            found += 1 if z[i] > -INFINITY else 0
    return found // s.tokens
