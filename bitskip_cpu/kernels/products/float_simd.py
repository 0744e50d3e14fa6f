"""Products of rows of floats, as LLVM IR (SPEC 4.5): the tree of 2.2, registers at a time.

A register holds neighbouring features of a row or of a token. Of V of them, a power of two, the
tree adds those that lie V / 2 apart first, then V / 4, and so on; so a group, the LEAVES whose
numbers are equal modulo V / LEAVES, is added up before it meets another. Groups are taken in
bit-reversed order, each for ROWS rows, whose weights stay in registers, and many tokens; a sum
waits in `room`, at its level, until its neighbour is there. In the end the lanes of one register
are left for each sum.

Zeros that pad a row are left out. They could but turn a sum of -0 into +0, which is done last.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir

from bitskip_cpu.kernels.arithmetic.elementwise import power_of_two
from bitskip_cpu.kernels.layout import FLOAT_BLOCK, FLOAT_TOKENS
from bitskip_cpu.kernels.numba_inside.decorators import intrinsic, kernel
from bitskip_cpu.kernels.numba_inside.emit import INT, LONG, loop, pointer, prefetch, variable
from bitskip_cpu.kernels.products import plain
from bitskip_cpu.kernels.products.dot import WIDTH

FLOATS_HELD = WIDTH // 4  # by a register
KIND = ir.VectorType(ir.FloatType(), FLOATS_HELD)
LEAVES = 8  # of a group; more than half of them lie before the padding
ROWS = 1 if WIDTH == 32 else 2  # AVX2 has half as many registers
MERGES = 3  # levels that a group's code goes down without a loop
STRIDE = FLOAT_BLOCK * WIDTH  # bytes from one token's sums of a level to the next
LEVEL = FLOAT_TOKENS * STRIDE  # bytes from one level to the next


def _load(builder: ir.IRBuilder, at: ir.Value) -> ir.Value:
    return builder.load(pointer(builder, at, KIND), align=4)


def _store(builder: ir.IRBuilder, value: ir.Value, at: ir.Value) -> None:
    builder.store(value, pointer(builder, at, value.type), align=4)


def _shuffled(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, lanes: list[int]) -> ir.Value:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT, len(lanes)), lanes))


def _emit_rows(
    builder: ir.IRBuilder, leaves: int, merges: int, w: ir.Value, row_bytes: ir.Value,
    pitch: ir.Value, x: ir.Value, x_stride: ir.Value, tokens: ir.Value, more: ir.Value,
    top: ir.Value, to: ir.Value,
) -> None:  # fmt: skip
    """`group_sums` of ROWS rows. `more`: levels beyond MERGES."""
    weights: list[list[ir.Value]] = []
    for r in range(ROWS):
        row = builder.add(w, builder.mul(row_bytes, LONG(r)))
        places = [builder.add(row, builder.mul(pitch, LONG(k))) for k in range(leaves)]
        weights.append([_load(builder, at) for at in places])
        for at in places:
            prefetch(builder, builder.add(at, builder.mul(row_bytes, LONG(FLOAT_BLOCK))))

    def total(at: ir.Value, k: int, step: int) -> list[ir.Value]:
        """Per row the sum of leaves k, k + step, ...: first those that lie furthest apart."""
        if step == LEAVES:
            leaf = _load(builder, builder.add(at, LONG(k * WIDTH)))
            return [builder.fmul(leaf, row[k]) for row in weights]
        sums = total(at, k, 2 * step)
        if k + step < leaves:
            others = total(at, k + step, 2 * step)
            sums = [builder.fadd(a, b) for a, b in zip(sums, others, strict=True)]
        return sums

    with loop(builder, tokens) as t:
        sums = total(builder.add(x, builder.mul(t, x_stride)), 0, 1)
        place = builder.mul(t, LONG(STRIDE))
        waiting, there = builder.add(top, place), builder.add(to, place)
        for r, value in enumerate(sums):
            for level in range(1, merges + 1):
                at = builder.add(waiting, LONG(r * WIDTH - level * LEVEL))
                value = builder.fadd(_load(builder, at), value)
            if merges == MERGES:
                held = variable(builder, value)
                with loop(builder, more) as level:
                    down = builder.sub(waiting, builder.mul(level, LONG(LEVEL)))
                    at = builder.add(down, LONG(r * WIDTH - (MERGES + 1) * LEVEL))
                    builder.store(builder.fadd(_load(builder, at), builder.load(held)), held)
                value = builder.load(held)
            _store(builder, value, builder.add(there, LONG(r * WIDTH)))


@intrinsic()
def group_sums(builder, leaves, merges, w, row_bytes, pitch, x, x_stride, tokens, top, to):
    """FLOAT_BLOCK rows x tokens: a group's sums, plus what waits `merges` levels down.

    The leaves of a row lie `pitch` bytes apart, those of a token side by side. `top`: the first
    free level; `to`: the level that the sums are for.
    """
    end = builder.append_basic_block("end")
    few = builder.icmp_signed("<", merges, LONG(MERGES))
    known = builder.select(few, merges, LONG(MERGES))
    more = builder.sub(merges, known)
    chosen = builder.switch(builder.or_(leaves, builder.shl(known, LONG(8))), end)
    for count in range(LEAVES // 2, LEAVES + 1):
        for merged in range(MERGES + 1):
            here = builder.append_basic_block(f"{count}_leaves_{merged}_merges")
            chosen.add_case(LONG(count | merged << 8), here)
            builder.position_at_end(here)
            with loop(builder, LONG(FLOAT_BLOCK // ROWS)) as index:
                first = builder.mul(index, LONG(ROWS))
                rows, lanes = builder.mul(first, row_bytes), builder.mul(first, LONG(WIDTH))
                _emit_rows(builder, count, merged, builder.add(w, rows), row_bytes, pitch, x,
                           x_stride, tokens, more, builder.add(top, lanes),
                           builder.add(to, lanes))  # fmt: skip
            builder.branch(end)
    builder.position_at_end(end)


@intrinsic(zero="float32")
def fold(builder, at, zero, out):
    """FLOAT_BLOCK registers -> the sums of their lanes by halving, plus zero, side by side."""
    parts = [_load(builder, builder.add(at, LONG(r * WIDTH))) for r in range(FLOAT_BLOCK)]
    size = FLOATS_HELD  # lanes that a row has left; rows lie side by side in a register
    while size > 1:
        half = size // 2
        low = [i + j for i in range(0, 2 * FLOATS_HELD, size) for j in range(half)]
        high = [lane + half for lane in low]
        if len(parts) == 1:
            parts *= 2
        parts = [
            builder.fadd(_shuffled(builder, a, b, low), _shuffled(builder, a, b, high))
            for a, b in zip(parts[::2], parts[1::2], strict=True)
        ]
        size = half
    nothing = ir.Constant(KIND, ir.Undefined)
    first = builder.insert_element(nothing, zero, INT(0))
    zeros = _shuffled(builder, first, nothing, [0] * FLOATS_HELD)
    kept = list(range(min(FLOATS_HELD, FLOAT_BLOCK)))
    for i, part in enumerate(parts):
        value = builder.fadd(part, zeros)
        _store(builder, _shuffled(builder, value, value, kept), builder.add(out, LONG(i * WIDTH)))


@intrinsic()
def gather(builder, x, pitch, leaves, to):
    """Put a group's leaves, which lie `pitch` bytes apart, side by side."""
    with loop(builder, leaves) as k:
        value = _load(builder, builder.add(x, builder.mul(k, pitch)))
        _store(builder, value, builder.add(to, builder.mul(k, LONG(WIDTH))))


@kernel
def in_groups(n):
    """Whether n floats are whole registers, enough for a group."""
    return n % FLOATS_HELD == 0 and power_of_two(n) >= LEAVES * FLOATS_HELD


@kernel
def groups_of(n):
    """How many groups n floats are."""
    return power_of_two(n) // (LEAVES * FLOATS_HELD)


@kernel
def leaves_of(n, groups, g):
    """How many leaves of group g lie before the padding."""
    return (n // FLOATS_HELD - g + groups - 1) // groups


@kernel
def next_group(groups, g):
    """The group after g in bit-reversed order, and how many levels g's sum goes down."""
    bit, merges = groups >> 1, 0
    while g & bit:
        g, bit, merges = g - bit, bit >> 1, merges + 1
    return g + bit, merges


@kernel
def order(x_at, n, to_at):
    """Put a token's n floats into the order in which `float_sums` takes them."""
    if not in_groups(n):
        return
    groups, g = groups_of(n), 0
    for _ in range(groups):
        leaves = leaves_of(n, groups, g)
        gather(x_at + g * WIDTH, groups * WIDTH, leaves, to_at)
        to_at += leaves * WIDTH
        g, _ = next_group(groups, g)


@kernel
def block_sums(tokens, x_at, x_stride, rows_at, row_bytes, n, out_at, out_stride, room_at):
    """`float_sums` of FLOAT_BLOCK rows and at most FLOAT_TOKENS tokens."""
    groups, g, top = groups_of(n), 0, room_at
    for _ in range(groups):
        leaves = leaves_of(n, groups, g)
        following, merges = next_group(groups, g)
        to = top - merges * LEVEL
        group_sums(leaves, merges, rows_at + g * WIDTH, row_bytes, groups * WIDTH, x_at, x_stride,
                   tokens, top, to)  # fmt: skip
        x_at, top, g = x_at + leaves * WIDTH, to + LEVEL, following
    zero = np.float32(0.0) if power_of_two(n) > n else np.float32(-0.0)
    for t in range(tokens):
        fold(room_at + t * STRIDE, zero, out_at + t * out_stride)


@kernel
def float_sums(
    tokens, x_at, x_stride, ordered_at, ordered_stride, rows_at, row_bytes, rows, n, out_at,
    out_stride, room_at, scratch_at,
):  # fmt: skip
    """Rows x tokens: out[t, r] = sum 2.2 of x[t, i] * rows[r, i] over n floats (SPEC 4.5).

    ordered: x as `order` has it; room: FLOAT_LEVELS levels; scratch: power_of_two(n) floats.
    """
    whole = rows // FLOAT_BLOCK * FLOAT_BLOCK if in_groups(n) else 0
    for t in range(0, tokens, FLOAT_TOKENS):
        for r in range(0, whole, FLOAT_BLOCK):
            block_sums(min(FLOAT_TOKENS, tokens - t), ordered_at + t * ordered_stride,
                       ordered_stride, rows_at + r * row_bytes, row_bytes, n,
                       out_at + t * out_stride + 4 * r, out_stride, room_at)  # fmt: skip
    plain.float_sums(tokens, x_at, x_stride, 0, 0, rows_at + whole * row_bytes, row_bytes,
                     rows - whole, n, out_at + 4 * whole, out_stride, 0, scratch_at)  # fmt: skip
