"""Attention over an int8 cache (SPEC 6.8): keys and values as codes, sums as integers.

Of one block and key-value head a page (`layout.CACHE`) has

    keys    [E' / 4, LANES, 4]  E' = E padded to a multiple of 4; a line holds 4 features of LANES
                                positions, codes + KEY_OFFSET
    steps   f32 [LANES]         of the keys
    steps   f32 [LANES]         of the values
    values  [LANES / 4, W, 4]   W = E padded to a multiple of 16; a line holds 4 positions of 16
                                features
"""

from __future__ import annotations

import math

import numpy as np

from bitskip_cpu.kernels.arithmetic.elementwise import fill_zero, magnitude_bits, quantize
from bitskip_cpu.kernels.arithmetic.lanes import LANE_BYTES
from bitskip_cpu.kernels.attention.int8_passes import (
    ASKED,
    BEHIND,
    KEY_OFFSET,
    LINES,
    PAGES,
    UNIT,
    UPPER,
    encode,
    largest,
    scores_1,
    scores_4,
    values_1,
    values_2,
    weigh,
)
from bitskip_cpu.kernels.layout import LANES, PANEL, QUERIES
from bitskip_cpu.kernels.numba_inside.atomics import fetch_scattered
from bitskip_cpu.kernels.numba_inside.decorators import kernel
from bitskip_cpu.kernels.numba_inside.views import floats, int8s, int32s, int64s
from bitskip_cpu.kernels.products.ternary_layout import COLUMNS, LINE
from bitskip_ref import constants

f32, f64, i32 = np.float32, np.float64, np.int32

LARGEST_CODE = f32(127.0)
LARGEST_WEIGHT = f32(constants.LARGEST_WEIGHT)
MINUS_INFINITY = f32(-np.inf)
PAGES_AHEAD = 8  # between asking for a page and its use
COLD_PAGES, HOT_PAGES = 8, 32  # whose values all queries take before the next
SHIFTED = f64(1 << UPPER)  # what an upper code counts
FLIP = i32(0x80808080 - (1 << 32) if KEY_OFFSET else 0)  # adds KEY_OFFSET to four codes


@kernel
def store_key_codes(key_at, keys_at, head_dim, lane, scratch_at):
    """Quantize one head's turned key into its lane of the page. Scratch: E' bytes."""
    fours = (head_dim + COLUMNS - 1) // COLUMNS
    step, _ = quantize(key_at, head_dim, LARGEST_CODE, scratch_at, fours * COLUMNS)
    codes, lines = int32s(scratch_at, fours), int32s(keys_at, fours * LANES)
    for i in range(fours):
        lines[i * LANES + lane] = i32(codes[i] ^ FLIP)
    floats(keys_at + fours * LINE, LANES)[lane] = step


@kernel
def store_value_codes(value_at, values_at, head_dim, width, lane, scratch_at):
    """Quantize one head's value into its place in the page. Scratch: W bytes."""
    step, _ = quantize(value_at, head_dim, LARGEST_CODE, scratch_at, width)
    codes, size = int8s(scratch_at, width), COLUMNS * width
    lines = int8s(values_at + lane // COLUMNS * size, size)
    for i in range(width):
        lines[i * COLUMNS + lane % COLUMNS] = codes[i]
    floats(values_at - LINE, LANES)[lane] = step


@kernel
def over_int8(
    queries, q_at, table, keys, values, _padded, head_dim, _slots_at, width, seen, cold,
    next_table, next_count, next_keys, out_at, scratch_at,
):  # fmt: skip
    """`queries` (1 to QUERIES) turned query heads over `seen` positions -> out (SPEC 6.8).

    q and out: [queries, E]. The rest: as for `attend.attend`, whose order of features this does
    not need. Scratch: `layout.int8_scratch` bytes.
    """
    pages, panels = (seen + LANES - 1) // LANES, (seen + PANEL - 1) // PANEL
    fours = (head_dim + COLUMNS - 1) // COLUMNS
    padded = fours * COLUMNS
    row = 4 * panels * PANEL  # bytes of a query's scores
    steps_at = scratch_at + QUERIES * row  # of values; so many rows `scores_4` writes
    weights_at, weights = steps_at + row, row // 4  # of each query upper, then lower codes
    facts_at = weights_at + 2 * queries * weights
    state_at = facts_at + 8 * QUERIES
    codes_at = state_at + 2 * LANE_BYTES
    sums_at = codes_at + (queries * padded + LINE - 1) // LINE * LINE
    sums = 4 * width + LINES * LINE  # bytes of a row's
    tops_at = sums_at + 2 * queries * sums
    asks_at = tops_at + 2 * QUERIES * 4 * PANEL
    lines = width // LANES
    parts = (lines * COLUMNS + ASKED - 1) // ASKED  # of a page's values

    scale = f32(1.0 / math.sqrt(float(head_dim)))
    for i in range(queries):
        fact = facts_at + 8 * i
        step, total = quantize(q_at + 4 * i * head_dim, head_dim, LARGEST_CODE,
                               codes_at + i * padded, padded)  # fmt: skip
        floats(fact, 1)[0] = step * scale
        int32s(fact + 4, 1)[0] = total
    none = floats(tops_at, queries * PANEL)
    for i in range(queries * PANEL):
        none[i] = MINUS_INFINITY
    for page in range(0, pages, PAGES):
        at, last = table + 8 * page, pages - 1 - page
        # What lies behind `seen` does not count: the last panel's are looked at once it is hidden.
        tops = tops_at if last >= PAGES else tops_at + QUERIES * 4 * PANEL
        to, steps_to = scratch_at + LANE_BYTES * page, steps_at + LANE_BYTES * page
        ahead = PAGES_AHEAD if cold and last > PAGES_AHEAD else 0
        soon, last_soon = at + 8 * ahead, last - ahead if ahead else 0
        if queries == 1:
            scores_1(at, keys, last, fours, codes_at, padded, facts_at, 0, to, row, tops, steps_to,
                     soon, last_soon)  # fmt: skip
        else:
            scores_4(at, keys, last, fours, codes_at, padded, facts_at, queries - 1, to, row, tops,
                     steps_to, soon, last_soon)  # fmt: skip
    fill_zero(steps_at + 4 * seen, panels * PANEL - seen)
    most = queries * panels if cold and pages > PAGES_AHEAD else 0
    asked = values_to_ask(table, values, pages, parts, most, asks_at)
    for i in range(queries):
        at, codes = scratch_at + i * row, weights_at + 2 * i * weights
        softmax_begin(at, seen, panels, state_at)
        top = max(largest(at + 4 * PANEL * (panels - 1)), largest(tops_at + 4 * PANEL * i))
        left, left_at = asked * parts - i * panels, asks_at + 8 * i * panels
        weigh(at, top, steps_at, panels, state_at, left, left_at)
        softmax_end(at, panels, codes, weights, state_at, facts_at + 8 * i)
    fetch_pages(next_table, 0, PAGES_AHEAD, next_count, next_keys, fours + 2)
    fill_zero(sums_at, queries * sums // 2)  # two rows a query, 4 bytes a number
    asking = cold and asked < pages
    chunk = COLD_PAGES if asking else HOT_PAGES
    for page in range(0, pages, chunk):
        some = min(chunk, pages - page)
        if asking:
            first = max(page + PAGES_AHEAD, asked)
            fetch_pages(table, first, page + PAGES_AHEAD + some, pages, values, lines * COLUMNS)
        for i in range(0, queries, 2):
            rows, to = weights_at + 2 * i * weights + page * LANES, sums_at + 2 * i * sums
            for line in range(0, lines, LINES):
                if queries - i == 1:
                    values_1(table + 8 * page, values, some, lines, line, lines - 1, rows, weights,
                             1, to + line * LINE, sums)  # fmt: skip
                else:
                    values_2(table + 8 * page, values, some, lines, line, lines - 1, rows, weights,
                             3, to + line * LINE, sums)  # fmt: skip
    for i in range(queries):
        at, factor = sums_at + 2 * i * sums, floats(facts_at + 8 * i, 1)[0]
        upper, lower = int32s(at, head_dim), int32s(at + sums, head_dim)
        out = floats(out_at + 4 * i * head_dim, head_dim)
        for j in range(head_dim):
            out[j] = f32(f64(upper[j]) * SHIFTED + f64(lower[j])) * factor  # exact, then rounded


@kernel
def values_to_ask(table, values, pages, parts, most, asks_at):
    """Put down for `weigh` where values begin that it asks for, at most so many addresses.

    Of each page `parts`, ASKED lines each, the first pages last: they are multiplied first, and
    are in the nearest cache if not all fit there. Before these, BEHIND times, steps of values,
    which are there. Return of how many pages.
    """
    page_at, asks = int64s(table, pages), int64s(asks_at, BEHIND + most)
    whole = min(most // parts, pages)
    for i in range(BEHIND):
        asks[i] = page_at[0] + values - LINE
    for i in range(whole):
        for part in range(parts):
            at = page_at[whole - 1 - i] + values + part * ASKED * LINE
            asks[BEHIND + i * parts + part] = at
    return whole


@kernel
def softmax_begin(scores_at, seen, panels, state_at):
    """Hide what lies behind `seen`; an empty state for `weigh`."""
    padded = panels * PANEL
    scores = floats(scores_at, padded)
    for s in range(seen, padded):
        scores[s] = MINUS_INFINITY
    fill_zero(state_at, 2 * LANES)  # of both kinds


@kernel
def softmax_end(weights_at, panels, codes_at, stride, state_at, factor_at):
    """e * step -> the upper codes of weights and `stride` bytes further the lower ones.

    The factor is what the sums of codes are multiplied with.
    """
    counts, total = int32s(state_at, LANES), 0
    for lane in range(LANES):
        total += counts[lane]
    top = i32(magnitude_bits(state_at + LANE_BYTES, LANES)).view(f32)  # a NaN, if there is one
    encode(weights_at, LARGEST_WEIGHT / top, panels, codes_at, codes_at + stride)
    floats(factor_at, 1)[0] = (top / LARGEST_WEIGHT) / (f32(total) / UNIT)


@kernel
def fetch_pages(table, first, end, pages, offset, lines):
    """Ask for the lines that lie at `offset` in pages first..end-1, if there are so many."""
    page_at = int64s(table, pages)
    for page in range(first, min(end, pages)):
        fetch_scattered(page_at[page] + offset, lines)
