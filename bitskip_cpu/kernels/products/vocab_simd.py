"""Kernels of the vocabulary's tiles of 8, 6 or 4 bits (`vocab_layout`), as LLVM IR (SPEC 4.4).

They work as `ternary_simd.packed_tile` does. On AVX2 so many planes are summed in 16 bits as fit:
of 4 bits four (4 * 2 * 15 * 127 = 15240), of 6 bits two (2 * 2 * 63 * 127 = 32004), of 8 bits one,
signs moved to the activations (2 * 127 * 127 = 32258).
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir

from bitskip_cpu.isa import PATH
from bitskip_cpu.kernels.numba_inside.decorators import intrinsic, kernel
from bitskip_cpu.kernels.numba_inside.emit import INT, LONG, call, loop, variable
from bitskip_cpu.kernels.products import plain
from bitskip_cpu.kernels.products.dot import (
    BYTES,
    INTS,
    WIDTH,
    Kernel,
    constant,
    dot,
    fetch_unit,
    load,
    starts,
)
from bitskip_cpu.kernels.products.ternary_layout import COLUMNS, LINE
from bitskip_cpu.kernels.products.ternary_simd import (
    REGISTERS,
    Line,
    Sums,
    broadcast,
    choose,
    load_line,
    shifted,
)
from bitskip_cpu.kernels.products.vocab_layout import VOCAB_COLUMNS, VOCAB_LINES

SUMMED = {4: 4, 6: 2, 8: 1}  # planes whose sums of pairs fit 16 bits


def planes(builder: ir.IRBuilder, bits: int, lines: list[Line], h: int) -> list[ir.Value]:
    """The four planes' codes in register h of a unit's lines."""
    if bits == 8:
        return [line[h] for line in lines]
    mask = constant(BYTES, 2**bits - 1)
    low = [builder.and_(line[h], mask) for line in lines]
    if bits == 4:
        high = [builder.and_(shifted(builder, line[h], 4), mask) for line in lines]
        return [low[0], high[0], low[1], high[1]]
    a, b, c = (shifted(builder, line[h], bits) for line, bits in zip(lines, (6, 4, 2), strict=True))
    return [*low, builder.and_(choose(builder, 3, a, choose(builder, 12, b, c)), mask)]


def unsigned(builder: ir.IRBuilder, w: ir.Value, codes: ir.Value) -> tuple[ir.Value, ir.Value]:
    """|w| and codes * sign w, whose products are the same."""
    sign = "llvm.x86.avx2.psign.b"
    return call(builder, sign, BYTES, w, w), call(builder, sign, BYTES, codes, w)


def multiply_vocab(
    builder: ir.IRBuilder, bits: int, tiles: list[ir.Value], units: ir.Value,
    token_at: list[ir.Value], chains: int,
) -> list[Sums]:  # fmt: skip
    """Emit the products of tiles, of which each unit in turns, with every token; sums of each."""
    found = [Sums(builder, len(token_at), REGISTERS, chains) for _ in tiles]
    with loop(builder, units) as index:
        first = builder.mul(index, LONG(VOCAB_COLUMNS))
        for tile, sums in zip(tiles, found, strict=True):
            at = builder.add(tile, builder.mul(index, LONG(VOCAB_LINES[bits] * LINE)))
            fetch_unit(builder, at, VOCAB_LINES[bits])
            lines = [load_line(builder, at, i * LINE) for i in range(VOCAB_LINES[bits])]
            weights = [planes(builder, bits, lines, h) for h in range(REGISTERS)]
            for p in range(4):
                column = builder.add(first, LONG(p * COLUMNS))
                for t, codes in enumerate(token_at):
                    four = broadcast(builder, codes, column)
                    for h in range(REGISTERS):
                        operands = weights[h][p], four
                        if bits == 8 and PATH.pairs:
                            operands = unsigned(builder, *operands)
                        sums.add(t, h, *operands, p)
                if (p + 1) % SUMMED[bits] == 0:
                    sums.flush()
    return found


def vocab_tile(bits: int, tokens: int, chains: int) -> Kernel:
    """(tile, units, codes, codes stride, last, out, out stride): 16 rows x tokens."""

    @intrinsic()
    def tile_sums(builder, tile, units, codes, codes_stride, last, out, out_stride):
        token_at = starts(builder, codes, codes_stride, last, tokens)
        (sums,) = multiply_vocab(builder, bits, [tile], units, token_at, chains)
        sums.store(out, out_stride)

    return tile_sums


def vocab_pair(bits: int) -> Kernel:
    """(tile, other, units, codes, out, other out): sums of two tiles, read in turns, one token."""

    @intrinsic()
    def tile_sums(builder, tile, other, units, codes, out, other_out):
        found = multiply_vocab(builder, bits, [tile, other], units, [codes], 2)
        for sums, to in zip(found, (out, other_out), strict=True):
            sums.store(to, LONG(0))

    return tile_sums


@intrinsic(returns="int32")
def lines_sum(builder, row, codes, lines):
    """Sum of products of `lines` times 64 codes of a row, int8, and as many of a token."""
    sums = [variable(builder, constant(INTS, 0)) for _ in range(REGISTERS)]
    added = variable(builder, constant(INTS, 0))  # what an offset of the codes adds
    with loop(builder, lines) as index:
        at = builder.mul(index, LONG(LINE))
        for h, total in enumerate(sums):
            here = builder.add(at, LONG(h * WIDTH))
            weights, four = load(builder, row, here), load(builder, codes, here)
            if PATH.pairs:
                weights, four = unsigned(builder, weights, four)
            elif not PATH.signed_bytes:
                offset = constant(BYTES, 128)
                weights = builder.xor(weights, offset)
                builder.store(dot(builder, builder.load(added), offset, four), added)
            builder.store(dot(builder, builder.load(total), weights, four), total)
    left = builder.load(sums[0])
    for total in sums[1:]:
        left = builder.add(left, builder.load(total))
    left = builder.sub(left, builder.load(added))
    return call(builder, f"llvm.vector.reduce.add.v{INTS.count}i32", INT, left)


@kernel
def row_sum(row_at, codes_at, n):
    """As `plain.row_sum`."""
    whole = n // LINE * LINE
    total = lines_sum(row_at, codes_at, n // LINE)
    return np.int32(total + plain.row_sum(row_at + whole, codes_at + whole, n - whole))


int4_1, int4_4 = vocab_tile(4, 1, 4), vocab_tile(4, 4, 4)
int6_1, int6_4 = vocab_tile(6, 1, 4), vocab_tile(6, 4, 4)
int8_1, int8_4, int8_8 = vocab_tile(8, 1, 4), vocab_tile(8, 4, 4), vocab_tile(8, 8, 1)
int4_pair, int6_pair, int8_pair = vocab_pair(4), vocab_pair(6), vocab_pair(8)
