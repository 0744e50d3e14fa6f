"""Sums of code products by vector instructions: which kernel serves how many tokens."""

from __future__ import annotations

from bitskip_cpu.isa import PATH
from bitskip_cpu.kernels.layout import ACC_STRIDE, INT4, INT6, INT8
from bitskip_cpu.kernels.numba_inside.decorators import kernel
from bitskip_cpu.kernels.products.dot import Kernel
from bitskip_cpu.kernels.products.float_simd import float_sums as float_sums
from bitskip_cpu.kernels.products.float_simd import order as order
from bitskip_cpu.kernels.products.ternary_layout import COLUMNS, LINE, TILE_ROWS
from bitskip_cpu.kernels.products.ternary_simd import (
    bytes_panel,
    packed_1,
    packed_2,
    packed_3,
    packed_4,
    packed_8,
    packed_pair,
    unpack_tile,
)
from bitskip_cpu.kernels.products.vocab_simd import (
    int4_1,
    int4_4,
    int4_pair,
    int6_1,
    int6_4,
    int6_pair,
    int8_1,
    int8_4,
    int8_8,
    int8_pair,
)

UNPACK_ABOVE, BYTES_ABOVE = PATH.unpack_above, PATH.bytes_above
EIGHT = BYTES_ABOVE > 4 and PATH.width == 64  # whether sums of 8 tokens are asked for and fit


@kernel
def packed_sums(tokens, tiles_at, tiles, size, units, tail, codes_at, stride, acc_at):
    """Sums of packed tiles, one after the other, each with 8, 4 or fewer tokens at a time."""
    for i in range(tiles):
        at, t = tiles_at + i * size, 0
        while t < tokens:
            codes, left = codes_at + t * stride, tokens - t
            to = acc_at + t * ACC_STRIDE + 4 * TILE_ROWS * i
            if left >= 8:
                packed_8(at, units, tail, codes, stride, 7, to, ACC_STRIDE)
                t += 8
            elif left >= 4:
                packed_4(at, units, tail, codes, stride, 3, to, ACC_STRIDE)
                t += 4
            else:
                if left == 3:
                    packed_3(at, units, tail, codes, stride, 2, to, ACC_STRIDE)
                elif left == 2:
                    packed_2(at, units, tail, codes, stride, 1, to, ACC_STRIDE)
                else:
                    packed_1(at, units, tail, codes, stride, 0, to, ACC_STRIDE)
                t = tokens


def by_panels(panel: Kernel, panel_tiles: int, panel_tokens: int) -> Kernel:
    """Sums of unpacked tiles by a kernel that takes so many tiles and tokens at a time."""

    @kernel
    def sums(tokens, tiles_at, tiles, size, fours, codes_at, stride, acc_at):
        for t in range(0, tokens, panel_tokens):
            codes, last = codes_at + t * stride, tokens - 1 - t
            for i in range(0, tiles, panel_tiles):
                to = acc_at + t * ACC_STRIDE + 4 * TILE_ROWS * i
                panel(tiles_at + i * size, size, tiles - 1 - i, fours, codes, stride, last, to,
                      ACC_STRIDE)  # fmt: skip

    return sums  # type: ignore[no-any-return]


bytes_sums = by_panels(bytes_panel, *PATH.panel)


@kernel
def ternary_sums(
    tokens, tiles_at, tiles, size, units, tail, padded, codes_at, stride, acc_at, room_at
):
    """Sums of code products of up to four packed tiles: acc int32 [T, BAND]; weights are w + 1.

    `size`: bytes of a tile, of `units` and a `tail`, which unpacked has `padded` columns; `stride`:
    bytes from one token's codes to the next. Few tokens multiply packed tiles; for many, unpacking
    into `room` first is cheaper.
    """
    if tokens <= UNPACK_ABOVE:
        packed_sums(tokens, tiles_at, tiles, size, units, tail, codes_at, stride, acc_at)
        return
    unpacked = TILE_ROWS * padded
    for i in range(tiles):
        unpack_tile(tiles_at + i * size, units, tail, room_at + i * unpacked)
    bytes_sums(tokens, room_at, tiles, unpacked, padded // COLUMNS, codes_at, stride, acc_at)


@kernel
def ternary_sums_of_halves(tiles, at, others, other_at, size, units, tail, codes_at, acc_at):
    """Sums of packed tiles of two places, read in turns, with one token: int32 [2, BAND].

    `others` <= `tiles` of them lie at the second place.
    """
    for i in range(others):
        to = acc_at + 4 * TILE_ROWS * i
        packed_pair(at + i * size, other_at + i * size, units, tail, codes_at, to, to + ACC_STRIDE)
    packed_sums(1, at + others * size, tiles - others, size, units, tail, codes_at, 0,
                acc_at + 4 * TILE_ROWS * others)  # fmt: skip


def vocab_sums_with(bytes_sums: Kernel) -> Kernel:
    """`vocab_sums` where that kernel multiplies unpacked tiles."""

    @kernel
    def vocab_sums(kind, tokens, tiles_at, tiles, size, units, codes_at, stride, acc_at):
        if kind == INT8 and tokens > BYTES_ABOVE:  # lies as unpacked tiles do
            bytes_sums(tokens, tiles_at, tiles, size, size // LINE, codes_at, stride, acc_at)
            return
        for i in range(tiles):
            at, t = tiles_at + i * size, 0
            while t < tokens:
                codes, last = codes_at + t * stride, tokens - 1 - t
                to = acc_at + t * ACC_STRIDE + 4 * TILE_ROWS * i
                t += 4
                if kind == INT4:
                    if last:
                        int4_4(at, units, codes, stride, last, to, ACC_STRIDE)
                    else:
                        int4_1(at, units, codes, stride, 0, to, ACC_STRIDE)
                elif kind == INT6:
                    if last:
                        int6_4(at, units, codes, stride, last, to, ACC_STRIDE)
                    else:
                        int6_1(at, units, codes, stride, 0, to, ACC_STRIDE)
                elif last > 3 and EIGHT:
                    int8_8(at, units, codes, stride, last, to, ACC_STRIDE)
                    t += 4
                elif last:
                    int8_4(at, units, codes, stride, last, to, ACC_STRIDE)
                else:
                    int8_1(at, units, codes, stride, 0, to, ACC_STRIDE)

    return vocab_sums  # type: ignore[no-any-return]


vocab_sums = vocab_sums_with(bytes_sums)
"""Sums of tiles of rows of the vocabulary: acc int32 [T, BAND]; weights count with their offset.

`kind`: INT4, INT6 or INT8; `size`: bytes of a tile, of `units`.
"""


@kernel
def vocab_sums_of_halves(kind, tiles, at, others, other_at, size, units, codes_at, acc_at):
    """As `ternary_sums_of_halves`, of tiles of rows of the vocabulary."""
    for i in range(others):
        first, other, to = at + i * size, other_at + i * size, acc_at + 4 * TILE_ROWS * i
        if kind == INT4:
            int4_pair(first, other, units, codes_at, to, to + ACC_STRIDE)
        elif kind == INT6:
            int6_pair(first, other, units, codes_at, to, to + ACC_STRIDE)
        else:
            int8_pair(first, other, units, codes_at, to, to + ACC_STRIDE)
    vocab_sums(kind, 1, at + others * size, tiles - others, size, units, codes_at, 0,
               acc_at + 4 * TILE_ROWS * others)  # fmt: skip
