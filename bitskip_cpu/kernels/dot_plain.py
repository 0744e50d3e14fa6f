"""The kernels of `dot_simd` as plain loops, for every other CPU and for interpreted runs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bitskip_cpu.kernels.inner import inner
from bitskip_cpu.kernels.memory import int8s, int32s

i32 = np.int32


@inner
def signed_dot(row_at, column_at, steps):
    """Signed bytes with signed bytes, 64 a step."""
    row, column = int8s(row_at, 64 * steps), int8s(column_at, 64 * steps)
    total = i32(0)
    for i in range(64 * steps):
        total += i32(i32(row[i]) * i32(column[i]))
    return total


def tile(tokens: int, rows: int) -> Callable[..., None]:
    """As `dot_simd.tile`: the sums of tokens x rows products."""

    @inner
    def kernel(a_at, a_stride, a_last, b_at, b_stride, b_last, steps, out_at, out_stride):
        for i in range(tokens):
            for j in range(rows):
                row = a_at + min(i, a_last) * a_stride
                column = b_at + min(j, b_last) * b_stride
                int32s(out_at + i * out_stride + 4 * j, 1)[0] = signed_dot(row, column, steps)

    return kernel


head_1x4, head_2x4, head_4x4 = (tile(n, 4) for n in (1, 2, 4))
