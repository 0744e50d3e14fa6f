"""RoPE, the key-value cache and attention of one token (SPEC section 6).

A page holds LANES positions (`layout.CACHE`). Of one block and key-value head it has

    keys   [E', LANES]  turned; E' is E padded to a power of two, at least 8 (more zeros can change
                        but the sign of a zero score, which exp does not see); features in the
                        order of `key_slots`
    values [LANES, W]   W = E padded to a multiple of LANES

of `size` bytes a number, 4 or 2 (SPEC 6.5), so that a score's tree over E runs on LANES
positions at once, and values stream by rows. Query heads that share a key-value head pass over it
together. The tree of SPEC 2.3 adds absolute positions: a page is a subtree of it, wherever it lies.
"""

from __future__ import annotations

import math

import numpy as np

from bitskip_cpu.kernels.arithmetic.elementwise import (
    INFINITY_BITS,
    ZERO,
    copy,
    fill_zero,
    magnitude_bits,
)
from bitskip_cpu.kernels.arithmetic.exponential import exp_differences
from bitskip_cpu.kernels.arithmetic.float16 import float16_bits, narrow
from bitskip_cpu.kernels.arithmetic.lanes import LANE_BYTES, add, larger, largest, reverse_64, scale
from bitskip_cpu.kernels.attention.passes import Kernel, products, weighed
from bitskip_cpu.kernels.layout import CACHED_FLOAT16, CACHED_FLOAT32, LANES, LEVELS
from bitskip_cpu.kernels.numba_inside.decorators import kernel
from bitskip_cpu.kernels.numba_inside.views import float16s, floats, int32s, int64s

f32 = np.float32

MINUS_INFINITY = f32(-np.inf)
PAGES_AHEAD = 3  # pages between asking for one and its use


@kernel
def rope(x_at, cos_at, sin_at, head_dim):
    """RoPE in place on one head (SPEC 6.1)."""
    half = head_dim >> 1
    low, high = floats(x_at, half), floats(x_at + 4 * half, half)
    cos, sin = floats(cos_at, half), floats(sin_at, half)
    for i in range(half):
        a, b = low[i], high[i]
        low[i] = a * cos[i] - b * sin[i]
        high[i] = b * cos[i] + a * sin[i]


@kernel
def store_key(key_at, keys_at, size, padded, head_dim, slots_at, lane):
    """Put one head's turned key into its lane of the page's keys of that head."""
    key, slots = floats(key_at, head_dim), int32s(slots_at, head_dim)
    if size == CACHED_FLOAT16:
        rounded = float16s(keys_at, padded * LANES)
        for i in range(head_dim):
            rounded[slots[i] * LANES + lane] = float16_bits(key[i])
    else:
        column = floats(keys_at, padded * LANES)
        for i in range(head_dim):
            column[slots[i] * LANES + lane] = key[i]


@kernel
def store_value(value_at, values_at, size, value_width, head_dim, lane):
    """Put one head's value into its row of the page's values of that head."""
    row_at = values_at + size * lane * value_width
    if size == CACHED_FLOAT16:
        narrow(value_at, row_at, head_dim)
    else:
        copy(value_at, row_at, head_dim)


@kernel
def lay_out(q_at, out_at, head_dim, padded, slots_at):
    """Put a query's features, and zeros behind them, where a cached key has them."""
    if head_dim == 64:
        reverse_64(q_at, out_at)
        return
    fill_zero(out_at, padded)
    q, out, slots = floats(q_at, head_dim), floats(out_at, padded), int32s(slots_at, head_dim)
    for i in range(head_dim):
        out[slots[i]] = q[i]


@kernel
def to_fetch(i, table, count, keys, values, cold, next_table, next_count, next_keys):
    """What to fetch at piece i of all that is read in a row, 0: nothing.

    `count` pages' keys, then their values, if they are `cold`; then the next part's keys.
    """
    if i < 2 * count:
        if not cold:
            return 0
        pages = int64s(table, count)
        return pages[i] + keys if i < count else pages[i - count] + values
    i -= 2 * count
    return int64s(next_table, next_count)[i] + next_keys if i < next_count else 0


def scoring(size: int) -> Kernel:
    """`score_pages` of keys of `size` bytes a number."""
    products_8, products_64 = products(8, size), products(64, size)

    @kernel
    def score_pages(
        queries, q_at, q_stride, table, keys, values, cold, next_table, next_count, next_keys,
        padded, seen, factor, out_at, out_stride, scratch_at,
    ):  # fmt: skip
        """out[i, s] = factor * sum 2.2 of q[i] * k[s], for s < seen, `queries` queries (SPEC 6.2).

        A query has E' floats, zeros behind E; out holds whole pages. Scratch: LANES floats a
        branch and query. The table and what follows it: as for `attend`.
        """
        leaves = 64 if padded >= 64 else 8
        branches = padded // leaves
        stride = branches * LANE_BYTES
        count = (seen + LANES - 1) // LANES
        pages = int64s(table, count)
        for page in range(count):
            k_at = pages[page] + keys
            soon_at = to_fetch(page + PAGES_AHEAD, table, count, keys, values, cold, next_table,
                               next_count, next_keys)  # fmt: skip
            for i in range(branches):
                branch = size * leaves * LANES * i
                q, k = q_at + 4 * leaves * i, k_at + branch
                soon = soon_at + branch if soon_at else 0
                to = scratch_at + i * LANE_BYTES
                if leaves == 64:
                    products_64(queries, q, q_stride, k, LANES, soon, to, stride)
                else:
                    products_8(queries, q, q_stride, k, LANES, soon, to, stride)
            for query in range(queries):
                at, n = scratch_at + query * stride, branches
                while n > 1:
                    n >>= 1
                    for i in range(n):
                        two = at + 2 * i * LANE_BYTES
                        add(two, two + LANE_BYTES, at + i * LANE_BYTES)
                scale(at, factor, out_at + query * out_stride + 4 * LANES * page)

    return score_pages  # type: ignore[no-any-return]


@kernel
def softmax_weights(e_at, seen):
    """Scores -> exp(score - largest); zeros behind `seen` to the page's end (SPEC 6.3)."""
    padded = (seen + LANES - 1) // LANES * LANES
    e = floats(e_at, padded)
    lanes_at = e_at + 4 * padded
    lanes = floats(lanes_at, LANES)
    for lane in range(LANES):
        lanes[lane] = MINUS_INFINITY
    for s in range(seen, padded):
        e[s] = MINUS_INFINITY
    for start in range(0, padded, LANES):
        larger(e_at + 4 * start, lanes_at, lanes_at)
    exp_differences(e_at, largest(lanes_at), e_at, padded)
    for s in range(seen, padded):
        e[s] = ZERO


def weighing(size: int) -> Kernel:
    """`weigh_page` of values of `size` bytes a number."""
    weigh = weighed(size)

    @kernel
    def weigh_page(queries, e_at, e_stride, values_at, soon_at, value_width, out_at, out_stride):
        """Per query, sum 2.3 over LANES positions of e * v, and behind it of e itself."""
        for i in range(0, value_width, LANES):
            v, soon, to = values_at + size * i, soon_at + size * i if soon_at else 0, out_at + 4 * i
            weigh(queries, e_at, e_stride, v, value_width, soon, to, out_stride)
        for query in range(queries):
            e = floats(e_at + query * e_stride, LANES)
            low = ((e[0] + e[1]) + (e[2] + e[3])) + ((e[4] + e[5]) + (e[6] + e[7]))
            high = ((e[8] + e[9]) + (e[10] + e[11])) + ((e[12] + e[13]) + (e[14] + e[15]))
            floats(out_at + query * out_stride + 4 * value_width, 1)[0] = low + high

    return weigh_page  # type: ignore[no-any-return]


@kernel
def add_to(a_at, target_at, n):
    """target = a + target, n a multiple of LANES."""
    for i in range(0, n, LANES):
        add(a_at + 4 * i, target_at + 4 * i, target_at + 4 * i)


def attending(size: int) -> Kernel:
    """`attend` over a cache of `size` bytes a number."""
    score_pages, weigh_page = scoring(size), weighing(size)

    @kernel
    def attend(
        queries, q_at, table, keys, values, padded, head_dim, slots_at, value_width, seen, cold,
        next_table, next_count, next_keys, out_at, scratch_at,
    ):  # fmt: skip
        """`queries` (1 to QUERIES) turned query heads over `seen` positions -> out (SPEC 6.2, 6.3).

        q and out: [queries, E]. `table`: addresses of pages, `keys` and `values`: where in each
        those of this head lie. `cold`: they have to come from memory. `next_*`: the same of keys
        that are read after these, and of how many pages; they are fetched meanwhile. Scratch
        (floats): scores, whole pages and one more, per query | queries, E' each | LEVELS + 1
        partial sums of value_width + LANES floats per query, before them those of branches | a
        page's values.
        """
        count = (seen + LANES - 1) // LANES
        pages = int64s(table, count)
        e_stride = 4 * (count + 1) * LANES
        query_at = scratch_at + queries * e_stride
        partial_at = query_at + 4 * padded * queries
        for i in range(queries):
            lay_out(q_at + 4 * i * head_dim, query_at + 4 * i * padded, head_dim, padded, slots_at)
        factor = f32(1.0 / math.sqrt(float(head_dim)))
        score_pages(queries, query_at, 4 * padded, table, keys, values, cold, next_table,
                    next_count, next_keys, padded, seen, factor, scratch_at, e_stride,
                    partial_at)  # fmt: skip
        for i in range(queries):
            softmax_weights(scratch_at + i * e_stride, seen)
        # A binary counter of partial sums: number i covers 2^i pages, as in the tree of SPEC 2.3.
        width = value_width + LANES
        whole = queries * width
        now_at = partial_at + 4 * LEVELS * whole
        last_at, within = pages[count - 1] + values, seen % LANES
        done = False
        while not done:
            fill_zero(partial_at, whole)  # weigh_page leaves gaps
            fill_zero(now_at, whole)
            for page in range(count):
                to = now_at if page & 1 else partial_at  # number 0 is free after every second page
                soon_at = to_fetch(count + page + PAGES_AHEAD, table, count, keys, values, cold,
                                   next_table, next_count, next_keys)  # fmt: skip
                at = pages[page] + values if page + 1 < count else last_at
                weigh_page(queries, scratch_at + 4 * LANES * page, e_stride, at, soon_at,
                           value_width, to, 4 * width)  # fmt: skip
                level = 0
                while (page >> level) & 1:
                    add_to(partial_at + 4 * level * whole, now_at, whole)
                    level += 1
                if level:
                    copy(now_at, partial_at + 4 * level * whole, whole)
            fill_zero(now_at, whole)
            for level in range(LEVELS):
                if (count >> level) & 1:
                    add_to(partial_at + 4 * level * whole, now_at, whole)
            for query in range(queries):
                at = now_at + 4 * query * width
                total = floats(at + 4 * value_width, 1)[0] + ZERO
                sums, out = floats(at, head_dim), floats(out_at + 4 * query * head_dim, head_dim)
                for i in range(head_dim):
                    out[i] = (sums[i] + ZERO) / total
            done = within == 0 or magnitude_bits(out_at, queries * head_dim) < INFINITY_BITS
            if not done:  # what lies behind may be no finite number, and 0 times it none: hide it
                size_of_row, clean_at = size * value_width, now_at + 4 * whole
                fill_zero(clean_at, size_of_row * LANES // 4)
                copy(last_at, clean_at, size_of_row * within // 4)
                last_at, within = clean_at, 0

    return attend  # type: ignore[no-any-return]


over_float32, over_float16 = attending(CACHED_FLOAT32), attending(CACHED_FLOAT16)
