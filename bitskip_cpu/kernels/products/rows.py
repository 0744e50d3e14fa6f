"""Rows of the linear layers and heads for all tokens at hand (SPEC 4.3 to 4.6)."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitskip_cpu.isa import PATH
from bitskip_cpu.kernels.arithmetic.elementwise import dot_tree, relu2
from bitskip_cpu.kernels.arithmetic.float16 import widen
from bitskip_cpu.kernels.arithmetic.lanes import scaled_sums
from bitskip_cpu.kernels.layout import BAND, FLOAT16, FLOAT32, INT4, INT6, LANES
from bitskip_cpu.kernels.numba_inside.decorators import kernel
from bitskip_cpu.kernels.numba_inside.views import floats, int32s
from bitskip_cpu.kernels.products import ternary_plain
from bitskip_cpu.kernels.products.ternary_layout import COLUMNS, LINE, TILE_ROWS
from bitskip_cpu.kernels.products.vocab_layout import GROUP, OFFSET

if PATH == "plain":
    from bitskip_cpu.kernels.products import vocab_plain as heads

    ternary: Any = ternary_plain
else:
    from bitskip_cpu.kernels.products import ternary_simd as ternary  # type: ignore[no-redef]
    from bitskip_cpu.kernels.products import vocab_simd as heads  # type: ignore[no-redef]

packed_1, packed_2, packed_3 = ternary.packed_1, ternary.packed_2, ternary.packed_3
packed_4, packed_8 = ternary.packed_4, ternary.packed_8
unpack_tile = ternary.unpack_tile
UNPACK_ABOVE = 16  # tokens; measured
blocks: Any
matrix_unit: Any
if PATH == "amx512":
    from bitskip_cpu.kernels.products import ternary_amx

    blocks = matrix_unit = ternary_amx
    FEW_ABOVE, FEW_ABOVE_SHORT = 2, 4  # tokens, of rows of LONG units or shorter ones; measured
else:
    blocks, matrix_unit = ternary, ternary_plain
    FEW_ABOVE = FEW_ABOVE_SHORT = UNPACK_ABOVE
LONG = 8
bytes_block, BLOCK_TILES, BLOCK_TOKENS = blocks.bytes_block, blocks.BLOCK_TILES, blocks.BLOCK_TOKENS
begin_blocks, end_blocks = matrix_unit.begin_blocks, matrix_unit.end_blocks
few_block, many_block = matrix_unit.few_block, matrix_unit.many_block
IN_PIECES = PATH == "amx512"
int4_1, int4_4, int6_1, int6_4 = heads.int4_1, heads.int4_4, heads.int6_1, heads.int6_4
int8_1, int8_4 = heads.int8_1, heads.int8_4
NEVER = 1 << 30
BYTES_ABOVE = NEVER if PATH in ("plain", "avx2") else 4  # tokens of an int8 head; measured
OFFSET4, OFFSET6, OFFSET8 = (np.int32(OFFSET[bits]) for bits in (4, 6, 8))

f32 = np.float32
ACC_STRIDE = 4 * BAND


@kernel
def bytes_sums(s, tiles_at, size, tiles, fours, acc_at):
    """Sums of tiles of bytes, `size` of them each: acc int32 [T, BAND]."""
    tokens, stride = s.tokens, s.codes_stride
    begin_blocks()
    for t in range(0, tokens, BLOCK_TOKENS):
        codes, last = s.codes + t * stride, tokens - 1 - t
        for i in range(0, tiles, BLOCK_TILES):
            to = acc_at + t * ACC_STRIDE + 4 * TILE_ROWS * i
            bytes_block(tiles_at + i * size, size, tiles - 1 - i, fours, codes, stride, last,
                        to, ACC_STRIDE)  # fmt: skip
    end_blocks()


@kernel
def ternary_sums(s, p, tiles_at, tiles, acc_at, unpacked_at):
    """Sums of code products of `tiles` tiles: acc int32 [T, BAND]; weights count as w + 1.

    Few tokens multiply the packed tiles, one after the other; for many, unpacking first is cheaper.
    """
    size, units, tail = TILE_ROWS * p.row_bytes, p.units, p.tail
    tokens, stride = s.tokens, s.codes_stride
    if tokens > UNPACK_ABOVE and IN_PIECES:
        many_block(tokens, tiles_at, tiles, size, units, tail, p.padded, s.codes, stride, acc_at,
                   ACC_STRIDE, unpacked_at)  # fmt: skip
        return
    if tokens > UNPACK_ABOVE:
        fours, room = p.padded // COLUMNS, TILE_ROWS * p.padded
        for i in range(tiles):
            unpack_tile(tiles_at + i * size, units, tail, unpacked_at + i * room)
        bytes_sums(s, unpacked_at, room, tiles, fours, acc_at)
        return
    if tokens > (FEW_ABOVE if units >= LONG else FEW_ABOVE_SHORT):
        few_block(tokens, tiles_at, tiles, size, units, tail, s.codes, stride, acc_at, ACC_STRIDE,
                  unpacked_at)  # fmt: skip
        return
    for i in range(tiles):
        at = tiles_at + i * size
        for t in range(0, tokens, 8):
            codes, left = s.codes + t * stride, tokens - t
            to = acc_at + t * ACC_STRIDE + 4 * TILE_ROWS * i
            if left == 1:
                packed_1(at, units, tail, codes, stride, 0, to, ACC_STRIDE)
            elif left == 2:
                packed_2(at, units, tail, codes, stride, 1, to, ACC_STRIDE)
            elif left == 3:
                packed_3(at, units, tail, codes, stride, 2, to, ACC_STRIDE)
            elif left <= 4:
                packed_4(at, units, tail, codes, stride, left - 1, to, ACC_STRIDE)
            else:
                packed_8(at, units, tail, codes, stride, left - 1, to, ACC_STRIDE)


@kernel
def ternary_rows(s, p, first, last, acc_at, unpacked_at):
    """Rows first..last-1 of one of the block's products, for every token (SPEC 4.3, 4.6).

    `first` is a multiple of TILE_ROWS.
    """
    weights_at = s.weights + s.layer * s.layer_bytes + p.weights
    alphas = floats(s.params + s.layer * s.params_stride + 4 * p.alphas, 3)
    steps, sums = floats(s.steps, s.tokens), int32s(s.sums, s.tokens)
    for start in range(first, last, BAND):
        stop = min(start + BAND, last)
        rows_at, tiles = weights_at + start * p.row_bytes, -(-(stop - start) // TILE_ROWS)
        ternary_sums(s, p, rows_at, tiles, acc_at, unpacked_at)
        for t in range(s.tokens):
            out_at, from_at = p.out + t * p.out_stride + 4 * start, acc_at + t * ACC_STRIDE
            step, total = steps[t], sums[t]
            begin = start
            for part in range(3):  # q, k, v or gate, up have each their own scale
                end = min(stop, p.end0 if part == 0 else (p.end1 if part == 1 else p.rows))
                scale = step * alphas[part]
                while begin + LANES <= end:
                    at = 4 * (begin - start)
                    scaled_sums(from_at + at, total, scale, out_at + at)
                    begin += LANES
                if begin < end:
                    out, acc = floats(out_at, end - start), int32s(from_at, end - start)
                    for i in range(begin - start, end - start):
                        out[i] = f32(np.int32(acc[i] - total)) * scale
                    begin = end
            if s.squared:
                relu2(out_at, stop - start)


@kernel
def float_rows(s, p, first, last, scratch_at):
    """The same rows of an FP32 model (SPEC 4.5)."""
    weights_at = s.weights + s.layer * s.layer_bytes + p.weights
    for row in range(first, last):
        row_at = weights_at + row * p.row_bytes
        for t in range(s.tokens):
            y = dot_tree(s.row + t * s.row_stride, row_at, p.width, scratch_at)
            floats(p.out + t * p.out_stride + 4 * row, 1)[0] = y


@kernel
def head_rows(s, first, last, scratch_at, acc_at):
    """Logits of ids first..last-1 for every token (SPEC 4.4, 4.5)."""
    if s.head_kind != FLOAT16 and s.head_kind != FLOAT32:
        integer_head_rows(s, first, last, acc_at)
        return
    widened_at = scratch_at + s.row_stride
    for row in range(first, last):
        row_at = s.head + row * s.head_row_bytes
        if s.head_kind == FLOAT16:
            widen(row_at, widened_at, s.hidden)
            row_at = widened_at
        for t in range(s.tokens):
            y = dot_tree(s.row + t * s.row_stride, row_at, s.hidden, scratch_at)
            floats(s.logits + 4 * (t * s.vocab + row), 1)[0] = y


@kernel
def integer_sums(s, tiles_at, tiles, acc_at):
    """Sums of code products of a head's tiles: acc int32 [T, BAND]; weights with their offset."""
    size, groups = TILE_ROWS * s.head_row_bytes, (s.hidden + GROUP - 1) // GROUP
    tokens, stride, kind = s.tokens, s.codes_stride, s.head_kind
    if kind != INT4 and kind != INT6 and tokens > BYTES_ABOVE:
        bytes_sums(s, tiles_at, size, tiles, size // LINE, acc_at)
        return
    for i in range(tiles):
        at = tiles_at + i * size
        for t in range(0, tokens, 4):
            codes, last = s.codes + t * stride, tokens - 1 - t
            to = acc_at + t * ACC_STRIDE + 4 * TILE_ROWS * i
            if kind == INT4:
                if last:
                    int4_4(at, groups, codes, stride, last, to, ACC_STRIDE)
                else:
                    int4_1(at, groups, codes, stride, 0, to, ACC_STRIDE)
            elif kind == INT6:
                if last:
                    int6_4(at, groups, codes, stride, last, to, ACC_STRIDE)
                else:
                    int6_1(at, groups, codes, stride, 0, to, ACC_STRIDE)
            elif last:
                int8_4(at, groups, codes, stride, last, to, ACC_STRIDE)
            else:
                int8_1(at, groups, codes, stride, 0, to, ACC_STRIDE)


@kernel
def integer_head_rows(s, first, last, acc_at):
    """`head_rows` of integer rows in tiles (`heads`); `first` is a multiple of TILE_ROWS."""
    steps, sums = floats(s.steps, s.tokens), int32s(s.sums, s.tokens)
    offset = OFFSET4 if s.head_kind == INT4 else (OFFSET6 if s.head_kind == INT6 else OFFSET8)
    for start in range(first, last, BAND):
        n = min(BAND, last - start)
        integer_sums(s, s.head + start * s.head_row_bytes, -(-n // TILE_ROWS), acc_at)
        scale = floats(s.head_scale + 4 * start, n)
        for t in range(s.tokens):
            step, total = steps[t], np.int32(offset * sums[t])
            z = floats(s.logits + 4 * (t * s.vocab + start), n)
            acc = int32s(acc_at + t * ACC_STRIDE, n)
            for i in range(n):
                z[i] = f32(np.int32(acc[i] - total)) * (step * scale[i])
