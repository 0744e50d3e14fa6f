"""The kernels of `dot_simd` as plain loops, for every other CPU and for interpreted runs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bitskip_cpu.kernels.inner import inner
from bitskip_cpu.kernels.memory import int8s, int32s, uint8s

i32 = np.int32


@inner
def packed_dot(row_at, column_at, steps):
    """64 packed bytes a step with 256 codes; the weights count as 0, 1, 2."""
    row, column = uint8s(row_at, 64 * steps), int8s(column_at, 256 * steps)
    total = i32(0)
    for step in range(steps):
        r, c = step * 64, step * 256
        for i in range(64):
            byte = i32(row[r + i])
            total += i32(
                i32(i32(byte & i32(3)) * i32(column[c + i]))
                + i32(i32((byte >> i32(2)) & i32(3)) * i32(column[c + 64 + i]))
                + i32(i32((byte >> i32(4)) & i32(3)) * i32(column[c + 128 + i]))
                + i32(i32(byte >> i32(6)) * i32(column[c + 192 + i]))
            )
    return total


@inner
def bytes_dot(row_at, column_at, steps):
    """Unsigned bytes with signed bytes, 64 a step."""
    row, column = uint8s(row_at, 64 * steps), int8s(column_at, 64 * steps)
    total = i32(0)
    for i in range(64 * steps):
        total += i32(i32(row[i]) * i32(column[i]))
    return total


@inner
def signed_dot(row_at, column_at, steps):
    """Signed bytes with signed bytes, 64 a step."""
    row, column = int8s(row_at, 64 * steps), int8s(column_at, 64 * steps)
    total = i32(0)
    for i in range(64 * steps):
        total += i32(i32(row[i]) * i32(column[i]))
    return total


def tile(rows: int, columns: int, dot: Callable[..., int], by_row: bool) -> Callable[..., None]:
    """As `dot_simd.tile`: the sums of rows x columns products."""

    @inner
    def kernel(a_at, a_stride, a_last, b_at, b_stride, b_last, steps, out_at, out_stride):
        for i in range(rows):
            for j in range(columns):
                row = a_at + min(i, a_last) * a_stride
                column = b_at + min(j, b_last) * b_stride
                outer, inner = (i, j) if by_row else (j, i)
                int32s(out_at + outer * out_stride + 4 * inner, 1)[0] = dot(row, column, steps)

    return kernel


ACTIVATION_OFFSET = 0
packed_4x1 = tile(4, 1, packed_dot, False)
packed_2x2 = tile(2, 2, packed_dot, False)
packed_1x4 = tile(1, 4, packed_dot, False)
bytes_4x4 = tile(4, 4, bytes_dot, False)
head_1x4 = tile(1, 4, signed_dot, True)
head_4x4 = tile(4, 4, signed_dot, True)
