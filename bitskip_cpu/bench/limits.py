"""What this machine can do at most: read memory, and multiply 8-bit codes.

Measured beside a benchmark, so that its figures can be given as shares.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

from bitskip_cpu import isa

ENOUGH = 1 << 30  # bytes of one sample: some 50 ms
TURNS = 1 << 21  # of one sample: some 20 ms


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
    def _reader(self) -> Callable[[int, int], int]:
        from bitskip_cpu.bench import loops

        return loops.reader()

    @cached_property
    def _multiplier(self) -> Callable[[int, int], int]:
        from bitskip_cpu.bench import loops

        return loops.matrix_multiplier() if isa.PATH.matrix_unit else loops.multiplier()

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
        from bitskip_cpu.bench.loops import MATRIX_TURN

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
