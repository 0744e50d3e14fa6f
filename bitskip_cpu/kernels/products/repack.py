"""Packed rows of a folder (FORMAT 2) -> tiles (`ternary_layout`), once when a model is loaded."""

from __future__ import annotations

from bitskip_cpu.kernels.numba_inside.decorators import kernel
from bitskip_cpu.kernels.numba_inside.views import uint8s, uint16s
from bitskip_cpu.kernels.products.ternary_layout import (
    BY_BYTES,
    BY_WORDS,
    COLUMNS,
    LINE,
    LINE_COLUMNS,
    PLANES,
    TILE_ROWS,
    UNIT_LINES,
    UNIT_WORTH,
)
from bitskip_cpu.kernels.products.transpose import SIDE, transpose


@kernel
def unpack_row(row_at, row_bytes, out_at):
    """One packed row -> its codes 0, 1, 2 as bytes, 256 for 64."""
    for start in range(0, row_bytes, 64):
        packed, to = uint8s(row_at + start, 64), out_at + 4 * start
        first, second = uint8s(to, 64), uint8s(to + 64, 64)
        third, fourth = uint8s(to + 128, 64), uint8s(to + 192, 64)
        for i in range(64):
            byte = packed[i]
            first[i] = byte & 3
            second[i] = (byte >> 2) & 3
            third[i] = (byte >> 4) & 3
            fourth[i] = byte >> 6


@kernel
def join_planes(planes_at, out_at):
    """PLANES planes of 64 codes -> one line."""
    out = uint8s(out_at, LINE)
    a, b = uint8s(planes_at, LINE), uint8s(planes_at + LINE, LINE)
    c = uint8s(planes_at + 2 * LINE, LINE)
    if BY_BYTES:
        for i in range(LINE):
            out[i] = a[i] + 3 * b[i] + 9 * c[i]
    elif BY_WORDS:
        words = uint16s(out_at, LINE // 2)
        for i in range(LINE // 2):
            even = a[2 * i] + 3 * a[2 * i + 1] + 9 * c[2 * i]
            odd = b[2 * i] + 3 * b[2 * i + 1] + 9 * c[2 * i + 1]
            words[i] = even | odd << 5
    else:
        d = uint8s(planes_at + 3 * LINE, LINE)
        for i in range(LINE):
            out[i] = a[i] | b[i] << 2 | c[i] << 4 | d[i] << 6


@kernel
def hide_lines(lines_at):
    """Move what a dense unit has beyond its stored lines into the unused bits of these."""
    if BY_WORDS:
        first, second = uint16s(lines_at, LINE // 2), uint16s(lines_at + LINE, LINE // 2)
        third = uint16s(lines_at + 2 * LINE, LINE // 2)
        for i in range(LINE // 2):
            first[i] |= (second[i] & 31) << 10
            second[i] = second[i] >> 5 | third[i] << 5
        return
    a, b = uint8s(lines_at, LINE), uint8s(lines_at + LINE, LINE)
    c, d = uint8s(lines_at + 2 * LINE, LINE), uint8s(lines_at + 3 * LINE, LINE)
    e, x = uint8s(lines_at + 4 * LINE, LINE), uint8s(lines_at + 5 * LINE, LINE)
    y, z = uint8s(lines_at + 6 * LINE, LINE), uint8s(lines_at + 7 * LINE, LINE)
    for i in range(LINE):
        a[i] |= (x[i] & 7) << 5
        b[i] |= (y[i] & 7) << 5
        c[i] |= (z[i] & 7) << 5
        d[i] |= ((z[i] >> 3) & 1) << 5 | (x[i] >> 3) << 6
        e[i] |= ((z[i] >> 4) & 1) << 5 | (y[i] >> 3) << 6


def repack(rows_at, row_bytes, rows, units, tail, tiles_at, scratch_at):
    """`rows` packed rows of row_bytes each, one behind the other -> tiles.

    Rows that the last tile lacks, and columns behind a row's end, have code 1 (weight 0). Scratch:
    32 * (C + 64) + 512 bytes, C the larger of a packed row's and a tile's columns.
    """
    lines = units * UNIT_WORTH + tail
    columns = lines * LINE_COLUMNS
    together = COLUMNS * SIDE  # columns of one transposition
    stride = (max(columns, 4 * row_bytes) + together - 1) // together * together
    planes_at = scratch_at + TILE_ROWS * stride
    unit_at = planes_at + TILE_ROWS * stride
    codes = uint8s(scratch_at, TILE_ROWS * stride)
    for i in range(TILE_ROWS * stride):
        codes[i] = 1
    to = tiles_at
    for first in range(0, rows, TILE_ROWS):
        for r in range(TILE_ROWS):
            if first + r < rows:
                unpack_row(rows_at + (first + r) * row_bytes, row_bytes, scratch_at + r * stride)
            else:
                for i in range(r * stride, (r + 1) * stride):
                    codes[i] = 1
        for column in range(0, columns, together):
            transpose(scratch_at + column, stride, planes_at + column * TILE_ROWS)
        for unit in range(units):
            for i in range(UNIT_WORTH):
                at = planes_at + (unit * UNIT_WORTH + i) * PLANES * LINE
                join_planes(at, unit_at + i * LINE)
            if BY_BYTES or BY_WORDS:
                hide_lines(unit_at)
            out, joined = uint8s(to, UNIT_LINES * LINE), uint8s(unit_at, UNIT_LINES * LINE)
            for i in range(UNIT_LINES * LINE):
                out[i] = joined[i]
            to += UNIT_LINES * LINE
        for i in range(units * UNIT_WORTH, lines):
            join_planes(planes_at + i * PLANES * LINE, to)
            to += LINE
