"""What attention does with an int8 cache, as LLVM IR (SPEC 6.8; layout: `int8`).

Positions are lanes of the scores, features those of the results: query codes and weights are
broadcast, so that nothing is added across lanes. Rows of PANEL positions are worked on whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir

from bitskip_cpu.isa import PATH
from bitskip_cpu.kernels.arithmetic.elementwise import copy
from bitskip_cpu.kernels.arithmetic.exponential import AT_ONCE, ROUNDER, exp, exp_of
from bitskip_cpu.kernels.arithmetic.lanes import (
    LANE_BYTES,
    LANE_FLOATS,
    LANE_INTS,
    load_lanes,
    splat,
    store_lanes,
    swapped,
)
from bitskip_cpu.kernels.layout import LANES, PANEL
from bitskip_cpu.kernels.numba_inside.decorators import intrinsic, kernel
from bitskip_cpu.kernels.numba_inside.emit import BYTE, INT, LONG, loop, pointer, prefetch, variable
from bitskip_cpu.kernels.numba_inside.views import floats, int8s, int32s, int64s, uint8s
from bitskip_cpu.kernels.products.dot import INTS, WIDTH, Kernel, load, starts
from bitskip_cpu.kernels.products.ternary_layout import COLUMNS, LINE
from bitskip_cpu.kernels.products.ternary_simd import REGISTERS, Sums, broadcast
from bitskip_cpu.kernels.products.vocab_layout import OFFSET
from bitskip_cpu.kernels.products.vocab_simd import unsigned
from bitskip_ref import constants

f32, i32 = np.float32, np.int32

KEY_OFFSET = OFFSET[8]  # added to a key's codes where `dot` takes unsigned bytes
assert PANEL == AT_ONCE * LANES
UNIT = f32(constants.SOFTMAX_UNIT)
UPPER = 7  # bits that a weight's upper code is shifted by; both have so many
ASKED = 16  # lines that `weigh` asks for with each panel
BEHIND = 4  # panels between asking for lines and waiting for them
PAGES = 4 if WIDTH == 64 else 1  # whose scores fit the registers
LINES = 4 if WIDTH == 64 else 1  # of values, likewise
PART = ir.VectorType(ir.FloatType(), WIDTH // 4)


# ---- products of codes -----------------------------------------------------------------


def score_pages(queries: int, chains: int) -> Kernel:
    """(table, keys, last page, fours, codes, stride, facts, last, out, out stride, tops, steps out,
    soon, last soon): scores.

    Of the pages in `table`, int64 addresses, and `queries` queries. `facts`: f32 step, with
    1 / sqrt(E) in it, and int32 sum of a query's codes. `tops`, f32 [queries, PANEL]: the first
    LANES are kept to the largest score in each. The steps of the keys, and then those of the
    values, follow the keys' codes; the latter are put side by side. Meanwhile all that of the
    pages at `soon`, a table, too, is asked for, unless the last one is the first.
    """

    @intrinsic()
    def pages_scores(
        builder, table, keys, last_page, fours, codes, stride, facts, last, out, out_stride, tops,
        steps_out, soon, last_soon,
    ):  # fmt: skip
        page_at = _page_parts(builder, table, last_page, keys)
        soon_at = _page_parts(builder, soon, last_soon, keys)
        asks = builder.icmp_signed(">", last_soon, LONG(0))
        code_at = starts(builder, codes, stride, last, queries)
        sums = Sums(builder, queries, PAGES * REGISTERS, chains)
        with loop(builder, fours) as index:
            line = builder.mul(index, LONG(LINE))
            codes_of = [
                load(builder, builder.add(base, line), LONG(h * WIDTH))
                for base in page_at for h in range(REGISTERS)
            ]  # fmt: skip
            with builder.if_then(asks):
                for base in soon_at:
                    prefetch(builder, builder.add(base, line), PATH.fetch.scattered)
            for t in range(queries):
                four = broadcast(builder, code_at[t], builder.mul(index, LONG(COLUMNS)))
                for r, code in enumerate(codes_of):
                    pair = unsigned(builder, code, four) if PATH.pairs else (code, four)
                    sums.add(t, r, *pair, 0)
            sums.flush()
        steps_at = builder.mul(fours, LONG(LINE))
        with builder.if_then(asks):
            for base in soon_at:
                for offset in (steps_at, builder.add(steps_at, LONG(LINE))):
                    prefetch(builder, builder.add(base, offset), PATH.fetch.scattered)
        steps, value_steps = (
            [
                builder.load(pointer(builder, builder.add(base, builder.add(at, LONG(h * WIDTH))),
                                     PART), align=4)
                for base in page_at for h in range(REGISTERS)
            ]
            for at in (steps_at, builder.add(steps_at, LONG(LINE)))
        )  # fmt: skip
        for r, step in enumerate(value_steps):
            place = builder.add(steps_out, LONG(r * WIDTH))
            builder.store(step, pointer(builder, place, PART), align=4)
        fact_at, to = starts(builder, facts, LONG(8), last, queries), out
        for t in range(queries):
            fact = builder.load(pointer(builder, fact_at[t], ir.FloatType()), align=4)
            step = _repeated(builder, fact, PART)
            at = pointer(builder, builder.add(fact_at[t], LONG(4)), INT)
            surplus = builder.mul(builder.load(at, align=4), INT(KEY_OFFSET))
            surplus = _repeated(builder, surplus, INTS)
            scores = []
            for r, total in enumerate(sums.finished(t)):
                score = builder.sitofp(builder.sub(total, surplus), PART)
                scores.append(builder.fmul(score, builder.fmul(step, steps[r])))
                place = builder.add(to, LONG(r * WIDTH))
                builder.store(scores[r], pointer(builder, place, PART), align=4)
            for h in range(REGISTERS):
                place = builder.add(tops, LONG(4 * PANEL * t + h * WIDTH))
                place = pointer(builder, place, PART)
                top = builder.load(place, align=4)
                for score in scores[h::REGISTERS]:
                    top = _larger(builder, top, score)
                builder.store(top, place, align=4)
            to = builder.add(to, out_stride)

    return pages_scores


def _page_parts(
    builder: ir.IRBuilder, table: ir.Value, last: ir.Value, part: ir.Value
) -> list[ir.Value]:
    """Addresses of a part of each of PAGES pages; those above the last one repeat it."""
    found = []
    for i in range(PAGES):
        page = builder.select(builder.icmp_signed("<", LONG(i), last), LONG(i), last)
        at = builder.add(table, builder.mul(page, LONG(8)))
        found.append(builder.add(builder.load(pointer(builder, at, LONG)), part))
    return found


def value_lines(queries: int) -> Kernel:
    """(table, values, pages, page lines, first, last line, weights, stride, last, out, out stride).

    Add sums over the pages of LINES lines of 16 features, from `first` on, with the upper and then
    the lower codes of `queries` queries: int32. A page has 4 times `page lines`.
    """

    @intrinsic()
    def lines_sums(
        builder, table, values, pages, page_lines, first, last_line, weights, stride, last, out,
        out_stride,
    ):  # fmt: skip
        rows = starts(builder, weights, stride, last, 2 * queries)
        sums = Sums(builder, 2 * queries, LINES * REGISTERS, 1)
        wide = builder.mul(page_lines, LONG(LINE))
        offsets = []
        for i in range(LINES):
            line = builder.add(first, LONG(i))
            line = builder.select(builder.icmp_signed("<", line, last_line), line, last_line)
            offsets.append(builder.mul(line, LONG(LINE)))
        with loop(builder, pages) as page:
            at = builder.add(table, builder.mul(page, LONG(8)))
            at = builder.add(builder.load(pointer(builder, at, LONG)), values)
            position = builder.mul(page, LONG(LANES))
            for four in range(LANES // COLUMNS):
                codes = [
                    load(builder, builder.add(at, offset), LONG(h * WIDTH))
                    for offset in offsets for h in range(REGISTERS)
                ]  # fmt: skip
                for t, row in enumerate(rows):
                    weight = broadcast(builder, row, builder.add(position, LONG(four * COLUMNS)))
                    for r, code in enumerate(codes):
                        sums.add(t, r, weight, code, 0)
                sums.flush()
                at = builder.add(at, wide)
        to = out
        for t in range(2 * queries):
            for r, total in enumerate(sums.finished(t)):
                place = pointer(builder, builder.add(to, LONG(r * WIDTH)), INTS)
                builder.store(builder.add(builder.load(place, align=4), total), place, align=4)
            to = builder.add(to, out_stride)

    return lines_sums


def _repeated(builder: ir.IRBuilder, value: ir.Value, kind: ir.VectorType) -> ir.Value:
    nothing = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(nothing, value, INT(0))
    mask = ir.Constant(ir.VectorType(INT, kind.count), [0] * kind.count)
    return builder.shuffle_vector(first, nothing, mask)


# ---- softmax ---------------------------------------------------------------------------


def _largest(x_at: int) -> Any:
    return floats(x_at, PANEL).max()


def _weigh(
    x_at: int, top: Any, steps_at: int, panels: int, state_at: int, asks: int, asks_at: int
) -> None:
    x, steps = floats(x_at, panels * PANEL), floats(steps_at, panels * PANEL)
    e = np.array([exp(score - top) for score in x])
    int32s(state_at, LANES)[:] += np.rint(e * UNIT).astype(i32).reshape(-1, LANES).sum(0, i32)
    x[:] = e * steps
    most = floats(state_at + LANE_BYTES, LANES)
    most[:] = np.maximum(most, x.reshape(-1, LANES).max(0))


def _encode(w_at: int, factor: Any, panels: int, upper_at: int, lower_at: int) -> None:
    n = panels * PANEL
    codes = np.rint(floats(w_at, n) * factor).astype(i32)
    uint8s(upper_at, n)[:] = codes >> UPPER
    uint8s(lower_at, n)[:] = codes & (1 << UPPER) - 1


def _panel(builder: ir.IRBuilder, at: ir.Value, index: ir.Value) -> list[ir.Value]:
    """Addresses of the panel's vectors of floats."""
    start = builder.add(at, builder.mul(index, LONG(4 * PANEL)))
    return [builder.add(start, LONG(i * LANE_BYTES)) for i in range(AT_ONCE)]


def _larger(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _larger_weight(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """Of floats from 0 up, which order as their bits do: a NaN is above all."""
    bits = [builder.bitcast(x, LANE_INTS) for x in (a, b)]
    return builder.select(builder.icmp_unsigned(">", *bits), a, b)


def _constant(value: float | np.float32) -> ir.Constant:
    return ir.Constant(LANE_FLOATS, [float(value)] * LANES)


@intrinsic(_largest, returns="float32")
def largest(builder, x_at):
    """The largest of a panel of floats."""
    x = _constant(-np.inf)
    for at in _panel(builder, x_at, LONG(0)):
        x = _larger(builder, x, load_lanes(builder, at))
    h = LANES // 2
    while h:
        x = _larger(builder, x, swapped(builder, x, h))
        h //= 2
    return builder.extract_element(x, INT(0))


@intrinsic(_weigh, top="float32")
def weigh(builder, x_at, top, steps_at, panels, state_at, asks, asks_at):
    """Scores -> e * step, in place.

    State, brought up to date: int32 [LANES], to add round(e * SOFTMAX_UNIT) to, and f32 [LANES],
    the largest e * step in some lane, a NaN if there is one. Meanwhile, with each of the first
    `asks` panels, ASKED lines are asked for: `asks_at` holds the address of the first ones
    BEHIND + panel. A CPU with too many lines on their way leaves out what is asked for, so one
    that was asked for BEHIND panels ago is read: that waits if memory is late.
    """
    counted_at = pointer(builder, state_at, LANE_INTS)
    most_at = builder.add(state_at, LONG(LANE_BYTES))
    total = variable(builder, builder.load(counted_at, align=4))
    most = variable(builder, load_lanes(builder, most_at))
    top = splat(builder, top)
    with loop(builder, panels) as index:
        places = _panel(builder, x_at, index)
        with builder.if_then(builder.icmp_signed("<", index, asks)):
            at = builder.add(asks_at, builder.mul(index, LONG(8)))
            before, asked = (
                builder.load(pointer(builder, builder.add(at, LONG(8 * ahead)), LONG))
                for ahead in (0, BEHIND)
            )
            builder.load_atomic(pointer(builder, before, LONG), "monotonic", 8)
            for line in range(ASKED):
                prefetch(builder, builder.add(asked, LONG(line * LINE)), PATH.fetch.scattered)
        e = exp_of(builder, [builder.fsub(load_lanes(builder, at), top) for at in places])
        counts, largest_of = builder.load(total), builder.load(most)
        for x, at, step_at in zip(e, places, _panel(builder, steps_at, index), strict=True):
            count = _rounded(builder, builder.fmul(x, _constant(UNIT)))
            counts = builder.add(counts, count)
            w = builder.fmul(x, load_lanes(builder, step_at))
            largest_of = _larger_weight(builder, largest_of, w)
            store_lanes(builder, w, at)
        builder.store(counts, total)
        builder.store(largest_of, most)
    builder.store(builder.load(total), counted_at, align=4)
    store_lanes(builder, builder.load(most), most_at)


def _rounded(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """SPEC 2.5, of 0 <= x < 2^22, as int32."""
    moved = builder.fadd(x, _constant(ROUNDER))
    bits = builder.bitcast(moved, LANE_INTS)
    base = int(ROUNDER.view(i32))
    return builder.sub(bits, ir.Constant(LANE_INTS, [base] * LANES))


@intrinsic(_encode, factor="float32")
def encode(builder, w_at, factor, panels, upper_at, lower_at):
    """Codes round(w * factor): their upper bits and their lower UPPER bits, uint8 each."""
    factor, kind = splat(builder, factor), ir.VectorType(BYTE, LANES)
    low = ir.Constant(LANE_INTS, [(1 << UPPER) - 1] * LANES)
    shift = ir.Constant(LANE_INTS, [UPPER] * LANES)
    with loop(builder, panels) as index:
        for i, at in enumerate(_panel(builder, w_at, index)):
            code = _rounded(builder, builder.fmul(load_lanes(builder, at), factor))
            place = builder.add(builder.mul(index, LONG(PANEL)), LONG(i * LANES))
            parts = (builder.lshr(code, shift), upper_at), (builder.and_(code, low), lower_at)
            for part, row_at in parts:
                to = pointer(builder, builder.add(row_at, place), kind)
                builder.store(builder.trunc(part, kind), to, align=1)


# ---- without instructions for products of bytes ----------------------------------------


def _plain_scores() -> Callable[..., None]:
    @kernel
    def pages_scores(
        table, keys, last_page, fours, codes, stride, facts, last, out, out_stride, tops, steps_out,
        soon, last_soon,
    ):  # fmt: skip
        """As `score_pages` does, one page."""
        at = int64s(table, 1)[0] + keys
        key_codes, steps = uint8s(at, fours * LINE), floats(at + fours * LINE, LANES)
        copy(at + (fours + 1) * LINE, steps_out, LANES)
        for t in range(last + 1):
            query, fact = int8s(codes + t * stride, fours * COLUMNS), facts + 8 * t
            step, surplus = floats(fact, 1)[0], KEY_OFFSET * int32s(fact + 4, 1)[0]
            scores, largest_of = floats(out + t * out_stride, LANES), floats(tops, LANES)
            tops += 4 * PANEL
            for s in range(LANES):
                total = i32(0)
                for i in range(fours):
                    for c in range(COLUMNS):
                        code = i32(key_codes[i * LINE + s * COLUMNS + c])
                        total = i32(total + code * i32(query[i * COLUMNS + c]))
                scores[s] = f32(i32(total - surplus)) * (step * steps[s])
                largest_of[s] = max(largest_of[s], scores[s])

    return pages_scores


def _plain_lines() -> Callable[..., None]:
    @kernel
    def lines_sums(
        table, values, pages, page_lines, first, last_line, weights, stride, last, out, out_stride
    ):
        """As `value_lines` does, one line."""
        page_at = int64s(table, pages)
        for t in range(last + 1):
            row, sums = (
                uint8s(weights + t * stride, pages * LANES),
                int32s(out + t * out_stride, LANES),
            )
            for page in range(pages):
                at = page_at[page] + values + first * LINE
                for four in range(LANES // COLUMNS):
                    codes = int8s(at + four * page_lines * LINE, LINE)
                    for i in range(LANES):
                        for c in range(COLUMNS):
                            weight = i32(row[page * LANES + four * COLUMNS + c])
                            sums[i] += i32(weight * i32(codes[i * COLUMNS + c]))

    return lines_sums


if PATH.compiled:
    scores_1, scores_4 = score_pages(1, 4), score_pages(4, 1)
    values_1, values_2 = value_lines(1), value_lines(2)
else:
    PAGES = LINES = 1
    scores_1 = scores_4 = _plain_scores()
    values_1 = values_2 = _plain_lines()
