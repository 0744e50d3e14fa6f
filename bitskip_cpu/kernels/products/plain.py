"""Sums of code products by plain loops, for CPUs without another path and interpreted runs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bitskip_cpu.isa import PATH
from bitskip_cpu.kernels.arithmetic.elementwise import dot_tree
from bitskip_cpu.kernels.layout import ACC_STRIDE, INT4, INT6
from bitskip_cpu.kernels.numba_inside.decorators import kernel
from bitskip_cpu.kernels.numba_inside.views import floats, int8s, int32s, uint8s
from bitskip_cpu.kernels.products.ternary_layout import (
    COLUMNS,
    LINE,
    LINE_COLUMNS,
    TILE_ROWS,
    UNIT_LINES,
)
from bitskip_cpu.kernels.products.vocab_layout import VOCAB_COLUMNS, VOCAB_LINES

i32 = np.int32
UNPACK_ABOVE = PATH.unpack_above


@kernel
def unpack_tile(tile_at, units, tail, out_at):
    """Unpack a tile's codes into bytes: 64 for every 4 columns, in the order of a line."""
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
    """Add the four planes of a packed line, each as `line_sums` does."""
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


@kernel
def clear(out_at):
    """Set a tile's sums to 0."""
    out = int32s(out_at, TILE_ROWS)
    for r in range(TILE_ROWS):
        out[r] = 0


@kernel
def packed_sums(tile_at, units, tail, codes_at, out_at):
    """Sums of a packed tile with one token."""
    clear(out_at)
    for line in range(units * UNIT_LINES + tail):
        packed_line_sums(tile_at + line * LINE, codes_at + line * LINE_COLUMNS, out_at)


@kernel
def bytes_sums(tile_at, fours, codes_at, out_at):
    """Sums of an unpacked tile of `fours` times 4 columns with one token."""
    clear(out_at)
    for k in range(fours):
        line_sums(tile_at + k * LINE, codes_at + k * COLUMNS, out_at)


@kernel
def row_sum(row_at, codes_at, n):
    """Sum of products of a row's n codes and a token's, int8 both, as int32 (SPEC 4.4)."""
    row, codes, total = int8s(row_at, n), int8s(codes_at, n), i32(0)
    for i in range(n):
        total = i32(total + i32(i32(row[i]) * i32(codes[i])))
    return total


@kernel
def ternary_sums(
    tokens, tiles_at, tiles, size, units, tail, padded, codes_at, stride, acc_at, room_at
):
    """As `simd.ternary_sums`."""
    for i in range(tiles):
        at = tiles_at + i * size
        if tokens > UNPACK_ABOVE:
            unpack_tile(at, units, tail, room_at)
        for t in range(tokens):
            codes, to = codes_at + t * stride, acc_at + t * ACC_STRIDE + 4 * TILE_ROWS * i
            if tokens > UNPACK_ABOVE:
                bytes_sums(room_at, padded // COLUMNS, codes, to)
            else:
                packed_sums(at, units, tail, codes, to)


@kernel
def ternary_sums_of_halves(tiles, at, others, other_at, size, units, tail, codes_at, acc_at):
    """As `simd.ternary_sums_of_halves`, but one place after the other."""
    for i in range(tiles):
        packed_sums(at + i * size, units, tail, codes_at, acc_at + 4 * TILE_ROWS * i)
    for i in range(others):
        to = acc_at + ACC_STRIDE + 4 * TILE_ROWS * i
        packed_sums(other_at + i * size, units, tail, codes_at, to)


def vocab_tile(bits: int) -> Callable[..., None]:
    """(tile, units, codes, out): sums of a tile of rows of 4 or 6 bits with one token."""
    lines = VOCAB_LINES[bits]

    @kernel
    def plane_code(line, i, p):
        """Plane p's code in byte i of a unit."""
        if bits == 4:
            return i32((line[(p >> 1) * LINE + i] >> np.uint8(4 * (p & 1))) & 15)
        if p < 3:
            return i32(line[p * LINE + i] & 63)
        low, middle, high = line[i] >> 6, line[LINE + i] >> 6, line[2 * LINE + i] >> 6
        return i32(low | middle << 2 | high << 4)

    @kernel
    def tile_sums(tile_at, units, codes_at, out_at):
        clear(out_at)
        out = int32s(out_at, TILE_ROWS)
        for unit in range(units):
            line = uint8s(tile_at + unit * lines * LINE, lines * LINE)
            codes = int8s(codes_at + unit * VOCAB_COLUMNS, VOCAB_COLUMNS)
            for p in range(4):
                for c in range(COLUMNS):
                    code = i32(codes[p * COLUMNS + c])
                    for r in range(TILE_ROWS):
                        out[r] += i32(plane_code(line, 4 * r + c, p) * code)

    return tile_sums


int4_tile, int6_tile = vocab_tile(4), vocab_tile(6)


@kernel
def vocab_sums(kind, tokens, tiles_at, tiles, size, units, codes_at, stride, acc_at):
    """As `simd.vocab_sums`."""
    for i in range(tiles):
        at = tiles_at + i * size
        for t in range(tokens):
            codes, to = codes_at + t * stride, acc_at + t * ACC_STRIDE + 4 * TILE_ROWS * i
            if kind == INT4:
                int4_tile(at, units, codes, to)
            elif kind == INT6:
                int6_tile(at, units, codes, to)
            else:  # lies as an unpacked tile does
                bytes_sums(at, size // LINE, codes, to)


@kernel
def vocab_sums_of_halves(kind, tiles, at, others, other_at, size, units, codes_at, acc_at):
    """As `simd.vocab_sums_of_halves`, but one place after the other."""
    vocab_sums(kind, 1, at, tiles, size, units, codes_at, 0, acc_at)
    vocab_sums(kind, 1, other_at, others, size, units, codes_at, 0, acc_at + ACC_STRIDE)


@kernel
def order(x_at, n, to_at):
    """As `float_simd.order`: none."""


@kernel
def float_sums(
    tokens, x_at, x_stride, ordered_at, ordered_stride, rows_at, row_bytes, rows, n, out_at,
    out_stride, room_at, scratch_at,
):  # fmt: skip
    """As `float_simd.float_sums`."""
    for r in range(rows):
        for t in range(tokens):
            y = dot_tree(x_at + t * x_stride, rows_at + r * row_bytes, n, scratch_at)
            floats(out_at + t * out_stride + 4 * r, 1)[0] = y
