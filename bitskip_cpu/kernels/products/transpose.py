"""Rows to columns, 16 x 16 numbers of 32 bits at a time."""

from __future__ import annotations

import numpy as np
from llvmlite import ir

from bitskip_cpu.kernels.numba_inside.decorators import intrinsic
from bitskip_cpu.kernels.numba_inside.emit import INT, LONG, pointer
from bitskip_cpu.kernels.numba_inside.views import int32s

SIDE = 16
ROW = ir.VectorType(INT, SIDE)


def _transpose(from_at: int, stride: int, to_at: int) -> None:
    rows = [int32s(from_at + r * stride, SIDE) for r in range(SIDE)]
    int32s(to_at, SIDE * SIDE)[:] = np.stack(rows, axis=1).reshape(-1)


@intrinsic(_transpose)
def transpose(builder, at, stride, to):
    """SIDE rows of SIDE int32, `stride` bytes apart -> their columns, one behind the other."""
    rows = []
    for _ in range(SIDE):
        rows.append(builder.load(pointer(builder, at, ROW), align=4))
        at = builder.add(at, stride)
    h = SIDE // 2
    while h:
        # Of four quarters of h x h, the upper right and the lower left change places.
        for i in (i for i in range(SIDE) if not i & h):
            low = [SIDE + k - h if k & h else k for k in range(SIDE)]
            high = [SIDE + k if k & h else k + h for k in range(SIDE)]
            rows[i], rows[i + h] = (
                builder.shuffle_vector(rows[i], rows[i + h], ir.Constant(ROW, lanes))
                for lanes in (low, high)
            )
        h //= 2
    for r, row in enumerate(rows):
        there = builder.add(to, LONG(r * 4 * SIDE))
        builder.store(row, pointer(builder, there, ROW), align=4)
