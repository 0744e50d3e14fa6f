"""What this machine can do at most: read memory, and multiply 8-bit codes.

Measured beside a benchmark, so that its figures can be given as shares. These kernels are compiled
only for that and belong to no forward pass.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
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
STREAMS, LINES = (2, 4) if isa.PATH.fetch_all else (1, 8)
AHEAD = 4096
ENOUGH = 1 << 30  # bytes of one sample: some 50 ms
TURNS = 1 << 21  # of one sample: some 20 ms
MATRIX_TURN = 4 * 16 * 16 * 64  # four products of 16 tokens, 16 rows, 64 columns

Compiled = Callable[[int, int], int]


def _reader() -> Compiled:
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
                if isa.PATH.fetch_all:
                    prefetch(builder, builder.add(at, LONG(AHEAD)), 3)
                value = builder.load(pointer(builder, at, vector), align=8)
                builder.store(builder.xor(builder.load(total), value), total)
        return _fold(builder, [builder.load(total) for total in sums])

    return _compile(lambda address, size: read(address, size))


def _multiplier() -> Compiled:
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


def _matrix_multiplier() -> Compiled:
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


def together(work: Callable[[int], object], threads: int) -> float:
    """Seconds until work(0) .. work(threads - 1) are done, each on a thread of its own."""
    helpers = [threading.Thread(target=work, args=(i,)) for i in range(1, threads)]
    start = time.perf_counter()
    for helper in helpers:
        helper.start()
    work(0)
    for helper in helpers:
        helper.join()
    return time.perf_counter() - start


class Limits:
    """Samples of both speeds per number of threads, taken when `sample` is called.

    Interpreted, nothing is measured, and without accumulators (path `plain`) no multiplication: the
    medians are then None.
    """

    def __init__(self, size: int) -> None:
        """`size`: bytes of the buffer to read, as large as what a token reads."""
        self.size = max(size, 1 << 16)
        self.read: dict[int, list[float]] = {}
        self.multiply: dict[int, list[float]] = {}

    @cached_property
    def _buffer(self) -> np.ndarray:
        return np.full(self.size, 85, np.uint8)  # written: untouched pages would all be one

    @cached_property
    def _reader(self) -> Compiled:
        return _reader()

    @cached_property
    def _multiplier(self) -> Compiled:
        return _matrix_multiplier() if isa.PATH.matrix_unit else _multiplier()

    def sample(self, threads: int) -> None:
        """Measure once more, on that many threads: bytes/s and 8-bit multiply-adds/s."""
        if isa.INTERPRETED:
            return
        self.read.setdefault(threads, []).append(self._read_speed(threads))
        if isa.PATH.accumulators:
            self.multiply.setdefault(threads, []).append(self._multiply_speed(threads))

    def _read_speed(self, threads: int) -> float:
        read, start = self._reader, self._buffer.ctypes.data
        part = self.size // threads // 4096 * 4096 or self.size // threads
        passes = -(-ENOUGH // self.size)

        def work(thread: int) -> None:
            for _ in range(passes):
                read(start + thread * part, part)

        return passes * part * threads / together(work, threads)

    def _multiply_speed(self, threads: int) -> float:
        multiply, path = self._multiplier, isa.PATH
        turn = MATRIX_TURN if path.matrix_unit else path.accumulators * path.width
        seconds = together(lambda thread: multiply(TURNS, 12345 + thread), threads)
        return TURNS * turn * threads / seconds

    def bytes_per_s(self, threads: int) -> float | None:
        """Median read bandwidth."""
        return _median(self.read.get(threads))

    def multiply_adds_per_s(self, threads: int) -> float | None:
        """Median peak of 8-bit multiply-adds."""
        return _median(self.multiply.get(threads))


def _median(samples: Sequence[float] | None) -> float | None:
    return statistics.median(samples) if samples else None
