"""Rows of the linear layers and heads for all tokens at hand (SPEC 4.3 to 4.6)."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitskip_cpu.isa import PATH
from bitskip_cpu.kernels.floats import dot_tree, relu2
from bitskip_cpu.kernels.halfs import widen
from bitskip_cpu.kernels.inner import inner
from bitskip_cpu.kernels.lanes import scaled_sums
from bitskip_cpu.kernels.layout import BAND, FLOAT16, INT4, INT6, INT8, LANES
from bitskip_cpu.kernels.memory import floats, int32s
from bitskip_cpu.kernels.narrow import GROUP
from bitskip_cpu.kernels.tiles import COLUMNS, TILE_ROWS

if PATH == "plain":
    from bitskip_cpu.kernels import dot_plain as dot
    from bitskip_cpu.kernels import narrow_plain as narrow
    from bitskip_cpu.kernels import ternary_plain as ternary
else:
    from bitskip_cpu.kernels import dot_simd as dot  # type: ignore[no-redef]
    from bitskip_cpu.kernels import narrow_simd as narrow  # type: ignore[no-redef]
    from bitskip_cpu.kernels import ternary_simd as ternary  # type: ignore[no-redef]

packed_1, packed_2 = ternary.packed_1, ternary.packed_2
packed_4, packed_8 = ternary.packed_4, ternary.packed_8
unpack_tile = ternary.unpack_tile
UNPACK_ABOVE = 16  # tokens; measured
blocks: Any
if PATH == "amx512":
    from bitskip_cpu.kernels import ternary_amx as blocks

    FEW_ABOVE, FEW_ABOVE_SHORT = 2, 4  # tokens, of rows of LONG units or shorter ones; measured
else:
    blocks = ternary
    FEW_ABOVE = FEW_ABOVE_SHORT = UNPACK_ABOVE
LONG = 8
begin_blocks, bytes_block, end_blocks = blocks.begin_blocks, blocks.bytes_block, blocks.end_blocks
few_block = blocks.few_block
BLOCK_TILES, BLOCK_TOKENS = blocks.BLOCK_TILES, blocks.BLOCK_TOKENS
head_1x4, head_2x4, head_4x4 = dot.head_1x4, dot.head_2x4, dot.head_4x4
int4_1, int4_4, int6_1, int6_4 = narrow.int4_1, narrow.int4_4, narrow.int6_1, narrow.int6_4

f32 = np.float32
ACC_STRIDE = 4 * BAND


@inner
def ternary_sums(s, p, tiles_at, tiles, acc_at, unpacked_at):
    """Sums of code products of `tiles` tiles: acc int32 [T, BAND]; weights count as w + 1.

    Few tokens multiply the packed tiles, one after the other; for many, unpacking first is cheaper.
    """
    size, units, tail = TILE_ROWS * p.row_bytes, p.units, p.tail
    tokens, stride = s.tokens, s.codes_stride
    if tokens > UNPACK_ABOVE:
        fours, room = p.padded // COLUMNS, TILE_ROWS * p.padded
        for i in range(tiles):
            unpack_tile(tiles_at + i * size, units, tail, unpacked_at + i * room)
        begin_blocks()
        for t in range(0, tokens, BLOCK_TOKENS):
            codes, last = s.codes + t * stride, tokens - 1 - t
            for i in range(0, tiles, BLOCK_TILES):
                to = acc_at + t * ACC_STRIDE + 4 * TILE_ROWS * i
                bytes_block(unpacked_at + i * room, room, tiles - 1 - i, fours, codes, stride, last,
                            to, ACC_STRIDE)  # fmt: skip
        end_blocks()
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
            elif left <= 4:
                packed_4(at, units, tail, codes, stride, left - 1, to, ACC_STRIDE)
            else:
                packed_8(at, units, tail, codes, stride, left - 1, to, ACC_STRIDE)


@inner
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


@inner
def float_rows(s, p, first, last, scratch_at):
    """The same rows of an FP32 model (SPEC 4.5)."""
    weights_at = s.weights + s.layer * s.layer_bytes + p.weights
    for row in range(first, last):
        row_at = weights_at + row * p.row_bytes
        for t in range(s.tokens):
            y = dot_tree(s.row + t * s.row_stride, row_at, p.width, scratch_at)
            floats(p.out + t * p.out_stride + 4 * row, 1)[0] = y


@inner
def head_rows(s, first, last, scratch_at, acc_at):
    """Logits of ids first..last-1 for every token (SPEC 4.4, 4.5)."""
    if s.head_kind == INT8:
        int8_head_rows(s, first, last, acc_at)
        return
    if s.head_kind == INT6 or s.head_kind == INT4:
        narrow_head_rows(s, first, last, acc_at)
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


@inner
def int8_head_rows(s, first, last, acc_at):
    """`head_rows` of int8 rows (SPEC 4.4)."""
    size, codes, stride = s.head_row_bytes, s.codes, s.codes_stride
    steps, scales = floats(s.steps, s.tokens), floats(s.head_scale, s.vocab)
    corrections = int32s(s.head_sums, s.vocab)
    for start in range(first, last, BAND):
        stop = min(start + BAND, last)
        for row in range(start, stop, 4):
            at, to, above = s.head + row * size, acc_at + 4 * (row - start), stop - 1 - row
            if s.tokens == 1:
                head_1x4(codes, stride, 0, at, size, above, size // 64, to, ACC_STRIDE)
            elif s.tokens == 2:
                head_2x4(codes, stride, 1, at, size, above, size // 64, to, ACC_STRIDE)
            else:
                for t in range(0, s.tokens, 4):
                    head_4x4(codes + t * stride, stride, s.tokens - 1 - t, at, size, above,
                             size // 64, to + t * ACC_STRIDE, ACC_STRIDE)  # fmt: skip
        for t in range(s.tokens):
            z = floats(s.logits + 4 * t * s.vocab, s.vocab)
            acc = int32s(acc_at + t * ACC_STRIDE, stop - start)
            step = steps[t]
            for i in range(start, stop):
                total = np.int32(acc[i - start] - corrections[i])
                z[i] = f32(total) * (step * scales[i])


@inner
def narrow_head_rows(s, first, last, acc_at):
    """`head_rows` of int6 and int4 rows in tiles (`narrow`); `first` is a multiple of TILE_ROWS."""
    size, codes, stride = s.head_row_bytes, s.codes, s.codes_stride
    steps, sums = floats(s.steps, s.tokens), int32s(s.sums, s.tokens)
    groups, wide = (s.hidden + GROUP - 1) // GROUP, s.head_kind == INT6
    offset = np.int32(32 if wide else 8)
    for start in range(first, last, BAND):
        stop = min(start + BAND, last)
        for row in range(start, stop, TILE_ROWS):
            at = s.head + row * size
            for t in range(0, s.tokens, 4):
                to, left = acc_at + t * ACC_STRIDE + 4 * (row - start), s.tokens - t
                if left == 1 and wide:
                    int6_1(at, groups, codes + t * stride, stride, 0, to, ACC_STRIDE)
                elif left == 1:
                    int4_1(at, groups, codes + t * stride, stride, 0, to, ACC_STRIDE)
                elif wide:
                    int6_4(at, groups, codes + t * stride, stride, left - 1, to, ACC_STRIDE)
                else:
                    int4_4(at, groups, codes + t * stride, stride, left - 1, to, ACC_STRIDE)
        for t in range(s.tokens):
            n, step, total = stop - start, steps[t], np.int32(offset * sums[t])
            z_at = s.logits + 4 * (t * s.vocab + start)
            z, acc = floats(z_at, n), int32s(acc_at + t * ACC_STRIDE, n)
            scale = floats(s.head_scale + 4 * start, n)
            for i in range(n):
                z[i] = f32(np.int32(acc[i] - total)) * (step * scale[i])
