"""The kernels of `ternary_simd` as plain loops, for every other CPU and for interpreted runs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bitskip_cpu.kernels.numba_inside.decorators import kernel
from bitskip_cpu.kernels.numba_inside.views import int8s, int32s, uint8s
from bitskip_cpu.kernels.products.ternary_layout import (
    COLUMNS,
    LINE,
    LINE_COLUMNS,
    TILE_ROWS,
    UNIT_LINES,
)

i32 = np.int32


@kernel
def unpack_tile(tile_at, units, tail, out_at):
    """The tile's codes as bytes: 64 for every 4 columns, in the order of a line."""
    for line in range(units * UNIT_LINES + tail):
        packed = uint8s(tile_at + line * LINE, LINE)
        out = uint8s(out_at + 4 * line * LINE, 4 * LINE)
        for i in range(LINE):
            byte = packed[i]
            out[i] = byte & 3
            out[LINE + i] = (byte >> 2) & 3
            out[2 * LINE + i] = (byte >> 4) & 3
            out[3 * LINE + i] = byte >> 6


@kernel
def line_sums(line_at, codes_at, out_at):
    """Add 64 bytes, 16 rows x 4 columns of unsigned codes, times 4 signed ones."""
    line, codes, out = uint8s(line_at, LINE), int8s(codes_at, COLUMNS), int32s(out_at, TILE_ROWS)
    a, b, c, d = i32(codes[0]), i32(codes[1]), i32(codes[2]), i32(codes[3])
    for r in range(TILE_ROWS):
        out[r] += i32(
            i32(i32(line[4 * r]) * a + i32(line[4 * r + 1]) * b)
            + i32(i32(line[4 * r + 2]) * c + i32(line[4 * r + 3]) * d)
        )


@kernel
def packed_line_sums(line_at, codes_at, out_at):
    """`line_sums` of the four planes of a packed line."""
    line, codes = uint8s(line_at, LINE), int8s(codes_at, LINE_COLUMNS)
    out = int32s(out_at, TILE_ROWS)
    for p in range(4):
        a, b = i32(codes[4 * p]), i32(codes[4 * p + 1])
        c, d = i32(codes[4 * p + 2]), i32(codes[4 * p + 3])
        shift = np.uint8(2 * p)
        for r in range(TILE_ROWS):
            w, x = (line[4 * r] >> shift) & 3, (line[4 * r + 1] >> shift) & 3
            y, z = (line[4 * r + 2] >> shift) & 3, (line[4 * r + 3] >> shift) & 3
            out[r] += i32(i32(i32(w) * a + i32(x) * b) + i32(i32(y) * c + i32(z) * d))


def packed_tile(tokens: int) -> Callable[..., None]:
    """As `ternary_simd.packed_tile`."""

    @kernel
    def tile_sums(tile_at, units, tail, codes_at, codes_stride, last, out_at, out_stride):
        for t in range(min(tokens, last + 1)):
            to, codes = out_at + t * out_stride, codes_at + t * codes_stride
            out = int32s(to, TILE_ROWS)
            for r in range(TILE_ROWS):
                out[r] = 0
            for line in range(units * UNIT_LINES + tail):
                packed_line_sums(tile_at + line * LINE, codes + line * LINE_COLUMNS, to)

    return tile_sums


@kernel
def bytes_block(
    tile_at, stride, last_tile, fours, codes_at, codes_stride, last, out_at, out_stride
):
    """As `ternary_simd.bytes_tile`: one tile, up to BLOCK_TOKENS tokens."""
    for t in range(min(BLOCK_TOKENS, last + 1)):
        to, codes = out_at + t * out_stride, codes_at + t * codes_stride
        out = int32s(to, TILE_ROWS)
        for r in range(TILE_ROWS):
            out[r] = 0
        for k in range(fours):
            line_sums(tile_at + k * LINE, codes + k * COLUMNS, to)


packed_1, packed_2, packed_3, packed_4, packed_8 = (packed_tile(n) for n in (1, 2, 3, 4, 8))
BLOCK_TILES, BLOCK_TOKENS = 1, 4


# ---- what paths without a matrix unit have in place of `ternary_amx`'s ----------------------


@kernel
def begin_blocks():
    """Before `bytes_block`s: nothing to be done."""


end_blocks = begin_blocks


@kernel
def many_block(
    tokens, tiles_at, tiles, size, units, tail, padded, codes_at, row, out_at, out_stride, room
):
    """Never called."""


@kernel
def few_block(tokens, tiles_at, tiles, size, units, tail, codes_at, row, out_at, out_stride, room):
    """Never called."""
