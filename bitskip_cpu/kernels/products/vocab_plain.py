"""The kernels of `heads_simd` as plain loops, for every other CPU and for interpreted runs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bitskip_cpu.kernels.numba_inside.decorators import kernel
from bitskip_cpu.kernels.numba_inside.views import int8s, int32s, uint8s
from bitskip_cpu.kernels.products.ternary_layout import COLUMNS, LINE, TILE_ROWS
from bitskip_cpu.kernels.products.vocab_layout import GROUP, LINES

i32 = np.int32


def head_tile(bits: int, tokens: int) -> Callable[..., None]:
    """As `heads_simd.head_tile`."""
    lines = LINES[bits]

    @kernel
    def plane_code(line, i, p):
        """Plane p's code in byte i of a group."""
        if bits == 8:
            return i32(line[p * LINE + i])
        if bits == 4:
            return i32((line[(p >> 1) * LINE + i] >> np.uint8(4 * (p & 1))) & 15)
        if p < 3:
            return i32(line[p * LINE + i] & 63)
        low, middle, high = line[i] >> 6, line[LINE + i] >> 6, line[2 * LINE + i] >> 6
        return i32(low | middle << 2 | high << 4)

    @kernel
    def tile_sums(tile_at, groups, codes_at, codes_stride, last, out_at, out_stride):
        for t in range(min(tokens, last + 1)):
            out = int32s(out_at + t * out_stride, TILE_ROWS)
            for r in range(TILE_ROWS):
                out[r] = 0
            for group in range(groups):
                line = uint8s(tile_at + group * lines * LINE, lines * LINE)
                codes = int8s(codes_at + t * codes_stride + group * GROUP, GROUP)
                for p in range(4):
                    for c in range(COLUMNS):
                        code = i32(codes[p * COLUMNS + c])
                        for r in range(TILE_ROWS):
                            out[r] += i32(plane_code(line, 4 * r + c, p) * code)

    return tile_sums


int4_1, int4_4 = head_tile(4, 1), head_tile(4, 4)
int6_1, int6_4 = head_tile(6, 1), head_tile(6, 4)
int8_1, int8_4 = head_tile(8, 1), head_tile(8, 4)
