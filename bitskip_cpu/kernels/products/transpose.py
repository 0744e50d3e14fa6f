"""Rows to columns, 16 x 16 numbers of 32 bits at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from bitskip_cpu.isa import INTERPRETED
from bitskip_cpu.kernels.numba_inside.views import int32s, vector_pointer

SIDE = 16
LONG = ir.IntType(64)
INTS = ir.VectorType(ir.IntType(32), SIDE)


def _transpose(from_at: int, stride: int, to_at: int) -> None:
    rows = [int32s(from_at + r * stride, SIDE) for r in range(SIDE)]
    int32s(to_at, SIDE * SIDE)[:] = np.stack(rows, axis=1).reshape(-1)


if INTERPRETED:
    transpose = _transpose
else:

    @intrinsic
    def transpose(typing: Any, from_at: Any, stride: Any, to_at: Any) -> Any:
        """SIDE rows of SIDE int32, `stride` bytes apart -> their columns, one behind the other."""

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            at, stride, to = args
            rows = []
            for _ in range(SIDE):
                rows.append(builder.load(vector_pointer(builder, at, INTS), align=4))
                at = builder.add(at, stride)
            h = SIDE // 2
            while h:
                # Of four squares of h x h, the upper right and the lower left change places.
                for i in (i for i in range(SIDE) if not i & h):
                    low = [SIDE + k - h if k & h else k for k in range(SIDE)]
                    high = [SIDE + k if k & h else k + h for k in range(SIDE)]
                    rows[i], rows[i + h] = (
                        builder.shuffle_vector(rows[i], rows[i + h], ir.Constant(INTS, lanes))
                        for lanes in (low, high)
                    )
                h //= 2
            for r, row in enumerate(rows):
                there = builder.add(to, LONG(r * 4 * SIDE))
                builder.store(row, vector_pointer(builder, there, INTS), align=4)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen
