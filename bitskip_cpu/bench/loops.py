"""Compiled loops that do nothing but read memory, or multiply 8-bit codes.

They belong to no forward pass. Importing this imports Numba, so it is done when they are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir
from numba import njit, types

from bitskip_cpu import isa
from bitskip_cpu.kernels.numba_inside.decorators import intrinsic
from bitskip_cpu.kernels.numba_inside.emit import (
    BYTE,
    INT,
    LONG,
    loop,
    pointer,
    prefetch,
    variable,
)

LINE = 64  # bytes
# Places read at once and cache lines of each: as fast as any of 24 mixtures, with each line asked
# for AHEAD bytes before its use; where the CPU's own prefetch is faster, one place.
STREAMS, LINES = (1, 8) if isa.PATH.fetch.sparse else (2, 4)
AHEAD = 4096
MATRIX_TURN = 4 * 16 * 16 * 64  # four products of 16 tokens, 16 rows, 64 columns

Compiled = Callable[[int, int], int]


def reader() -> Compiled:
    """(address, bytes) -> xor of the memory; reads it once, at the speed it can be had."""
    vector = ir.VectorType(LONG, LINE // 8)

    @intrinsic(returns="int64")
    def read(builder: ir.IRBuilder, address: ir.Value, size: ir.Value) -> ir.Value:
        stream = builder.udiv(size, LONG(STREAMS))
        zero = ir.Constant(vector, [0] * vector.count)
        sums = [variable(builder, zero) for _ in range(STREAMS * LINES)]
        with loop(builder, builder.udiv(stream, LONG(LINES * LINE))) as index:
            offset = builder.add(address, builder.mul(index, LONG(LINES * LINE)))
            for i, total in enumerate(sums):
                start = builder.mul(stream, LONG(i // LINES))
                at = builder.add(builder.add(offset, start), LONG(i % LINES * LINE))
                if not isa.PATH.fetch.sparse:
                    prefetch(builder, builder.add(at, LONG(AHEAD)), 1)
                value = builder.load(pointer(builder, at, vector), align=8)
                builder.store(builder.xor(builder.load(total), value), total)
        return _fold(builder, [builder.load(total) for total in sums])

    return _compile(lambda address, size: read(address, size))


def multiplier() -> Compiled:
    """(turns, seed) -> anything; a turn is the path's own product on each of its accumulators.

    That is `dot`; where pairs are summed in 16 bits first, just these sums.
    """
    from bitskip_cpu.kernels.products.dot import BYTES, INTS, WORDS, constant, dot, sums_of_pairs

    count = isa.PATH.accumulators

    def add(builder: ir.IRBuilder, total: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
        if not isa.PATH.pairs:
            return dot(builder, total, u, s)
        words = builder.add(builder.bitcast(total, WORDS), sums_of_pairs(builder, u, s))
        return builder.bitcast(words, INTS)

    @intrinsic(returns="int64")
    def multiply(builder: ir.IRBuilder, turns: ir.Value, seed: ir.Value) -> ir.Value:
        start = ir.Constant(INTS, ir.Undefined)
        for lane in range(INTS.count):
            start = builder.insert_element(start, builder.trunc(seed, INT), INT(lane))
        signed = builder.bitcast(builder.mul(start, constant(INTS, 0x01030507)), BYTES)
        sums = [
            variable(builder, builder.add(start, constant(INTS, 7919 * i))) for i in range(count)
        ]
        with loop(builder, turns):
            for i, total in enumerate(sums):
                # The neighbour's sum as an operand: no product can be moved out of the loop.
                unsigned = builder.load(sums[(i + 1) % count])
                operand = builder.bitcast(unsigned, BYTES)
                builder.store(add(builder, builder.load(total), operand, signed), total)
        longs = ir.VectorType(LONG, INTS.count // 2)
        return _fold(builder, [builder.bitcast(builder.load(t), longs) for t in sums])

    return _compile(lambda turns, seed: multiply(turns, seed))


def matrix_multiplier() -> Compiled:
    """(turns, seed) -> 0; a turn is MATRIX_TURN multiply-adds of the matrix unit, in registers."""
    from bitskip_cpu.kernels.products.amx import configure_16, matrix, release

    @intrinsic()
    def multiply(builder: ir.IRBuilder, turns: ir.Value) -> None:
        for register in range(8):
            matrix(builder, "tilezero", BYTE(register))
        with loop(builder, turns):
            for total in range(4):
                operands = BYTE(4 + total // 2), BYTE(6 + total % 2)
                matrix(builder, "tdpbsud", BYTE(total), *operands)

    def run(turns: int, seed: int) -> int:
        configure_16()
        multiply(turns)
        release()
        return 0

    return _compile(run)


def _fold(builder: ir.IRBuilder, vectors: Sequence[ir.Value]) -> ir.Value:
    """The xor of all lanes, so that no load counts as unused."""
    whole = vectors[0]
    for vector in vectors[1:]:
        whole = builder.xor(whole, vector)
    result = LONG(0)
    for lane in range(whole.type.count):
        result = builder.xor(result, builder.extract_element(whole, INT(lane)))
    return result


def _compile(function: Callable[[int, int], int]) -> Compiled:
    return njit([types.int64(types.int64, types.int64)], nogil=True)(function)  # type: ignore[no-any-return]
