"""RoPE, the key-value cache and attention of one token (SPEC section 6).

Cache of one block (`keys_at`, `values_at`), LANES positions to a group:

    keys   [K, S / LANES, E', LANES]  turned; E' is E padded to a power of two, at least 8 (more
                                      zeros can change but the sign of a zero score, which exp
                                      does not see)
    values [K, S, W]                  W = E padded to a multiple of LANES

of `size` bytes a number, FULL or HALF (SPEC 6.5), so that a score's tree over E runs on LANES
positions at once, and values stream by rows. Query heads that share a key-value head pass over it
together.
"""

from __future__ import annotations

import math

import numpy as np

from bitskip_cpu.kernels.cached import eight_products, prefetch, weighed
from bitskip_cpu.kernels.exponential import exp_differences
from bitskip_cpu.kernels.floats import ZERO, copy, fill_zero
from bitskip_cpu.kernels.halfs import half, narrow
from bitskip_cpu.kernels.inner import inner
from bitskip_cpu.kernels.lanes import LANE_BYTES, add, eight_sum, larger, scale
from bitskip_cpu.kernels.layout import HALF, LANES, LEVELS
from bitskip_cpu.kernels.memory import floats, halfs

f32 = np.float32

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
def store_key(key_at, keys_at, size, padded, head_dim, position):
    """Put one head's turned key at its position; `keys_at` is the head's part of the cache."""
    group, lane = position // LANES, position % LANES
    key, column_at = floats(key_at, head_dim), keys_at + size * group * padded * LANES
    if size == HALF:
        rounded = halfs(column_at, padded * LANES)
        for i in range(head_dim):
            rounded[i * LANES + lane] = half(key[i])
    else:
        column = floats(column_at, padded * LANES)
        for i in range(head_dim):
            column[i * LANES + lane] = key[i]


@inner
def store_value(value_at, values_at, size, value_width, head_dim, position):
    """The same of one head's value."""
    row_at = values_at + size * position * value_width
    if size == HALF:
        narrow(value_at, row_at, head_dim)
    else:
        copy(value_at, row_at, head_dim)


@inner
def score_groups(
    queries, q_at, q_stride, keys_at, size, padded, seen, ahead, out_at, out_stride, scratch_at
):
    """out[i, s] = sum 2.2 of q[i] * k[s], for s < seen and `queries` queries (SPEC 6.2).

    A query has E' floats, zeros behind E; out holds whole groups. Scratch: E' / 8 * LANES floats
    a query.
    """
    m = padded >> 3
    stride = m * LANE_BYTES
    for start in range(0, seen, LANES):
        k_at = keys_at + size * start * padded
        for i in range(m):
            k, to = k_at + size * i * LANES, scratch_at + i * LANE_BYTES
            if ahead:
                prefetch(k_at + ahead + i * 8 * LANES * size, 8 * LANES * size)
            eight_products(queries, size, q_at + 4 * i, q_stride, k, m, to, stride)
        for query in range(queries):
            at, n = scratch_at + query * stride, m
            while n >= 8:
                n >>= 3
                for i in range(n):
                    eight_sum(at + i * LANE_BYTES, n)
            while n > 1:
                n >>= 1
                for i in range(n):
                    add(at + i * LANE_BYTES, at + (i + n) * LANE_BYTES, at + i * LANE_BYTES)
            copy(at, out_at + query * out_stride + 4 * start, LANES)


@inner
def softmax_weights(e_at, head_dim, seen):
    """Scores -> exp(score * scale - largest); zeros behind `seen` to the group's end (SPEC 6.3)."""
    factor = f32(1.0 / math.sqrt(float(head_dim)))
    padded = (seen + LANES - 1) // LANES * LANES
    e = floats(e_at, padded)
    lanes_at = e_at + 4 * padded
    largest = floats(lanes_at, LANES)
    for lane in range(LANES):
        largest[lane] = LOWEST
    for s in range(seen, padded):
        e[s] = LOWEST
    for start in range(0, padded, LANES):
        scale(e_at + 4 * start, factor, e_at + 4 * start)
        larger(e_at + 4 * start, lanes_at, lanes_at)
    top = largest[0]
    for lane in range(1, LANES):
        top = largest[lane] if largest[lane] > top else top
    exp_differences(e_at, top, e_at, padded)
    for s in range(seen, padded):
        e[s] = ZERO


@inner
def weigh_group(queries, e_at, e_stride, values_at, size, value_width, ahead, out_at, out_stride):
    """Per query sum 2.3 over LANES positions of e * v, and behind it of e itself."""
    row = size * value_width
    for i in range(0, value_width, LANES):
        v, to = values_at + size * i, out_at + 4 * i
        if ahead:
            prefetch(values_at + ahead + i * LANES * size, LANES * LANES * size)
        weighed(queries, size, e_at, e_stride, v, row, to, out_stride)
    for query in range(queries):
        e = floats(e_at + query * e_stride, LANES)
        low = ((e[0] + e[1]) + (e[2] + e[3])) + ((e[4] + e[5]) + (e[6] + e[7]))
        high = ((e[8] + e[9]) + (e[10] + e[11])) + ((e[12] + e[13]) + (e[14] + e[15]))
        floats(out_at + query * out_stride + 4 * value_width, 1)[0] = low + high


@inner
def add_to(a_at, target_at, n):
    """target = a + target, n a multiple of LANES."""
    for i in range(0, n, LANES):
        add(a_at + 4 * i, target_at + 4 * i, target_at + 4 * i)


@inner
def attend(
    queries, q_at, keys_at, values_at, size, padded, head_dim, value_width, seen, ahead, out_at,
    scratch_at,
):  # fmt: skip
    """`queries` (4, 2 or 1) turned query heads over `seen` positions -> out (SPEC 6.2, 6.3).

    `ahead`: bytes between what is read and what memory is asked for; 0 does not ask.

    q and out: [queries, E]. Scratch (floats): scores, whole groups and one more, per query |
    queries, E' each | first sums, 4 * E' / 8 * LANES; in their place later LEVELS + 1 partial sums
    of value_width + LANES floats per query.
    """
    groups = (seen + LANES - 1) // LANES
    e_stride = 4 * (groups + 1) * LANES
    query_at = scratch_at + queries * e_stride
    parts_at = query_at + 4 * padded * queries
    for i in range(queries):
        copy(q_at + 4 * i * head_dim, query_at + 4 * i * padded, head_dim)
        fill_zero(query_at + 4 * (i * padded + head_dim), padded - head_dim)
    score_groups(
        queries, query_at, 4 * padded, keys_at, size, padded, seen, ahead,
        scratch_at, e_stride, parts_at,
    )  # fmt: skip
    for i in range(queries):
        softmax_weights(scratch_at + i * e_stride, head_dim, seen)
    # A binary counter of partial sums: part i covers 2^i groups, as in the tree of SPEC 2.3.
    width = value_width + LANES
    whole = queries * width
    now_at = parts_at + 4 * LEVELS * whole
    fill_zero(parts_at, whole)  # weigh_group leaves gaps
    fill_zero(now_at, whole)
    for group in range(groups):
        first = group * LANES
        to = now_at if group & 1 else parts_at  # part 0 is free after every second group
        v_at = values_at + size * first * value_width
        weigh_group(
            queries, scratch_at + 4 * first, e_stride, v_at, size, value_width, ahead, to, 4 * width
        )
        level = 0
        while (group >> level) & 1:
            add_to(parts_at + 4 * level * whole, now_at, whole)
            level += 1
        if level:
            copy(now_at, parts_at + 4 * level * whole, whole)
    fill_zero(now_at, whole)
    for level in range(LEVELS):
        if (groups >> level) & 1:
            add_to(parts_at + 4 * level * whole, now_at, whole)
    for query in range(queries):
        at = now_at + 4 * query * width
        total = floats(at + 4 * value_width, 1)[0] + ZERO
        sums, out = floats(at, head_dim), floats(out_at + 4 * query * head_dim, head_dim)
        for i in range(head_dim):
            out[i] = (sums[i] + ZERO) / total
