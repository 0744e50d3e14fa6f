"""RoPE, the key-value cache and attention of one token (SPEC section 6).

Cache of one block (`keys_at`, `values_at`), LANES positions to a group:

    keys   [K, S / LANES, E', LANES]  E' = E padded to a power of two; turned keys
    values [K, S, E]

so that a score's tree over E runs on LANES positions at once, and values stream by rows.
"""

from __future__ import annotations

import math

import numpy as np

from bitskip_cpu.kernels.floats import ZERO, copy, exp, fill_zero
from bitskip_cpu.kernels.inner import inner
from bitskip_cpu.kernels.lanes import add, larger, scale, two_products
from bitskip_cpu.kernels.layout import LANES
from bitskip_cpu.kernels.memory import floats

f32 = np.float32

LANE_BYTES = 4 * LANES
LEVELS = 24  # of the streamed tree: up to 2^24 groups of positions
LOWEST = f32(-np.inf)


@inner
def turn(x_at, cos_at, sin_at, head_dim):
    """RoPE in place on one head (SPEC 6.1)."""
    half = head_dim >> 1
    low, high = floats(x_at, half), floats(x_at + 4 * half, half)
    cos, sin = floats(cos_at, half), floats(sin_at, half)
    for i in range(half):
        a, b = low[i], high[i]
        low[i] = a * cos[i] - b * sin[i]
        high[i] = b * cos[i] + a * sin[i]


@inner
def store_key(key_at, keys_at, padded, head_dim, position):
    """Put one head's turned key at its position; `keys_at` is the head's part of the cache."""
    group, lane = position // LANES, position % LANES
    key = floats(key_at, head_dim)
    column = floats(keys_at + 4 * group * padded * LANES, padded * LANES)
    for i in range(head_dim):
        column[i * LANES + lane] = key[i]


@inner
def scores(q_at, keys_at, padded, head_dim, seen, out_at, scratch_at):
    """out[s] = sum 2.2 of q * k[s], scaled, for s < seen; -> the largest (SPEC 6.2).

    q has E' floats, zeros behind E; out holds whole groups, its surplus is set to LOWEST; scratch
    holds (E' / 2 + 1) * LANES floats.
    """
    factor = f32(1.0 / math.sqrt(float(head_dim)))
    half = padded >> 1
    q = floats(q_at, padded)
    largest_at = scratch_at + half * LANE_BYTES
    largest = floats(largest_at, LANES)
    for lane in range(LANES):
        largest[lane] = LOWEST
    for start in range(0, seen, LANES):
        k_at, to = keys_at + 4 * start * padded, out_at + 4 * start
        for e in range(half):
            low_at = k_at + e * LANE_BYTES
            high_at = low_at + half * LANE_BYTES
            two_products(q[e], low_at, q[e + half], high_at, scratch_at + e * LANE_BYTES)
        n = half
        while n > 1:
            n >>= 1
            for i in range(n):
                at = scratch_at + i * LANE_BYTES
                add(at, at + n * LANE_BYTES, at)
        scale(scratch_at, factor, to)
        if seen - start < LANES:
            surplus = floats(to, LANES)
            for lane in range(seen - start, LANES):
                surplus[lane] = LOWEST
        larger(to, largest_at, largest_at)
    result = largest[0]
    for lane in range(1, LANES):
        result = largest[lane] if largest[lane] > result else result
    return result


@inner
def weigh_group(e_at, values_at, head_dim, out_at):
    """sum 2.3 of e * v over LANES positions, and of e itself behind it: out [E + 1]."""
    e, v, out = floats(e_at, LANES), floats(values_at, LANES * head_dim), floats(out_at, head_dim)
    e0, e1, e2, e3, e4, e5, e6, e7 = e[0], e[1], e[2], e[3], e[4], e[5], e[6], e[7]
    e8, e9, ea, eb, ec, ed, ee, ef = e[8], e[9], e[10], e[11], e[12], e[13], e[14], e[15]
    d = head_dim
    for i in range(d):
        a = (e0 * v[i] + e1 * v[d + i]) + (e2 * v[2 * d + i] + e3 * v[3 * d + i])
        b = (e4 * v[4 * d + i] + e5 * v[5 * d + i]) + (e6 * v[6 * d + i] + e7 * v[7 * d + i])
        c = (e8 * v[8 * d + i] + e9 * v[9 * d + i]) + (ea * v[10 * d + i] + eb * v[11 * d + i])
        f = (ec * v[12 * d + i] + ed * v[13 * d + i]) + (ee * v[14 * d + i] + ef * v[15 * d + i])
        out[i] = (a + b) + (c + f)
    low = ((e0 + e1) + (e2 + e3)) + ((e4 + e5) + (e6 + e7))
    high = ((e8 + e9) + (ea + eb)) + ((ec + ed) + (ee + ef))
    floats(out_at + 4 * d, 1)[0] = low + high


@inner
def add_to(a_at, target_at, n):
    """target = a + target."""
    a, target = floats(a_at, n), floats(target_at, n)
    for i in range(n):
        target[i] = a[i] + target[i]


@inner
def attend(q_at, keys_at, values_at, padded, head_dim, seen, out_at, scratch_at):
    """One turned query head over `seen` positions -> out [E] (SPEC 6.2, 6.3).

    Scratch (floats): scores, whole groups | query, E' | first products, (E' / 2 + 1) * LANES, then
    LEVELS + 1 partial sums, E + 1 each.
    """
    e_at = scratch_at
    groups = (seen + LANES - 1) // LANES
    query_at = e_at + 4 * groups * LANES
    parts_at = query_at + 4 * padded
    width = head_dim + 1
    copy(q_at, query_at, head_dim)
    fill_zero(query_at + 4 * head_dim, padded - head_dim)
    largest = scores(query_at, keys_at, padded, head_dim, seen, e_at, parts_at)
    e = floats(e_at, groups * LANES)
    for s in range(seen):
        e[s] = exp(e[s] - largest)
    for s in range(seen, groups * LANES):
        e[s] = ZERO
    # A binary counter of partial sums: part i covers 2^i groups, as in the tree of SPEC 2.3.
    now_at = parts_at + 4 * LEVELS * width
    for group in range(groups):
        first = group * LANES
        weigh_group(e_at + 4 * first, values_at + 4 * first * head_dim, head_dim, now_at)
        level = 0
        while (group >> level) & 1:
            add_to(parts_at + 4 * level * width, now_at, width)
            level += 1
        copy(now_at, parts_at + 4 * level * width, width)
    fill_zero(now_at, width)
    for level in range(LEVELS):
        if (groups >> level) & 1:
            add_to(parts_at + 4 * level * width, now_at, width)
    total = floats(now_at + 4 * head_dim, 1)[0] + ZERO
    weighed, out = floats(now_at, head_dim), floats(out_at, head_dim)
    for i in range(head_dim):
        out[i] = (weighed[i] + ZERO) / total
