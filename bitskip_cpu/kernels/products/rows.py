"""Rows of the linear layers and of the vocabulary for all tokens at hand (SPEC 4.3 to 4.8)."""

from __future__ import annotations

from importlib import import_module

import numpy as np

from bitskip_cpu.isa import PATH
from bitskip_cpu.kernels.arithmetic.elementwise import relu2
from bitskip_cpu.kernels.arithmetic.float16 import widen, widen_bfloat16
from bitskip_cpu.kernels.arithmetic.lanes import scaled_sums
from bitskip_cpu.kernels.layout import (
    ACC_STRIDE,
    BAND,
    FLOAT16,
    FLOAT32,
    INT4,
    INT6,
    INT8,
    LANES,
    WIDENED,
)
from bitskip_cpu.kernels.numba_inside.decorators import kernel
from bitskip_cpu.kernels.numba_inside.views import floats, int32s
from bitskip_cpu.kernels.products.ternary_layout import TILE_ROWS
from bitskip_cpu.kernels.products.vocab_layout import OFFSET, VOCAB_COLUMNS

path = import_module(f"bitskip_cpu.kernels.products.{PATH.kernels}")
ternary_sums, vocab_sums = path.ternary_sums, path.vocab_sums
ternary_sums_of_halves = path.ternary_sums_of_halves
vocab_sums_of_halves = path.vocab_sums_of_halves
float_sums, order = path.float_sums, path.order
row_sum = import_module(f"{__package__}.{'vocab_simd' if PATH.compiled else 'plain'}").row_sum

OFFSET4, OFFSET6, OFFSET8 = (np.int32(OFFSET[bits]) for bits in (4, 6, 8))

IN_HALVES = PATH.fetch.halves  # whether one token's parts may be of two runs of rows: `apart`

f32 = np.float32


@kernel
def apart_from(s, start, stop):
    """A part's other run of rows, beside its rows start..stop-1 (STATE's `apart`)."""
    other = start + s.apart
    return other, max(other, min(stop + s.apart, s.last_row))


@kernel
def tiles_of(start, stop):
    """How many tiles rows start..stop-1 are."""
    return -(-(stop - start) // TILE_ROWS)


@kernel
def ternary_rows(s, p, first, last, acc_at, unpacked_at):
    """Rows first..last-1 of one of the block's products, for every token (SPEC 4.3, 4.6).

    And those apart from them, if the part has such. `first` is a multiple of TILE_ROWS.
    """
    weights_at = s.weights + s.layer * s.layer_bytes + p.weights
    size = TILE_ROWS * p.row_bytes
    for start in range(first, last, BAND):
        stop = min(start + BAND, last)
        rows_at, tiles = weights_at + start * p.row_bytes, tiles_of(start, stop)
        if IN_HALVES and s.apart:
            other, other_stop = apart_from(s, start, stop)
            ternary_sums_of_halves(tiles, rows_at, tiles_of(other, other_stop),
                                   weights_at + other * p.row_bytes, size, p.units, p.tail,
                                   s.codes, acc_at)  # fmt: skip
            scale_ternary(s, p, other, other_stop, acc_at + ACC_STRIDE)
        else:
            ternary_sums(s.tokens, rows_at, tiles, size, p.units, p.tail, p.padded, s.codes,
                         s.codes_stride, acc_at, unpacked_at)  # fmt: skip
        scale_ternary(s, p, start, stop, acc_at)


@kernel
def scale_ternary(s, p, start, stop, acc_at):
    """Results start..stop-1 of a product from their sums, for every token (SPEC 4.3, 4.6)."""
    alphas = floats(s.params + s.layer * s.params_stride + 4 * p.alphas, 3)
    steps, sums = floats(s.steps, s.tokens), int32s(s.sums, s.tokens)
    for t in range(s.tokens):
        out_at, from_at = p.out + t * p.out_stride + 4 * start, acc_at + t * ACC_STRIDE
        step, total = steps[t], sums[t]
        begin = start
        for member in range(3):  # q, k, v or gate, up have each their own scale
            end = min(stop, p.end0 if member == 0 else (p.end1 if member == 1 else p.rows))
            scale = step * alphas[member]
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
def linear_floats(s, p, first, last, scratch_at, room_at):
    """Rows first..last-1 of a product of an FP32 model, for every token (SPEC 4.5)."""
    rows_at = s.weights + s.layer * s.layer_bytes + p.weights + first * p.row_bytes
    times_floats(s, rows_at, p.row_bytes, last - first, p.width, p.out + 4 * first, p.out_stride,
                 scratch_at, room_at)  # fmt: skip


@kernel
def times_floats(s, rows_at, row_bytes, count, width, out_at, out_stride, scratch_at, room_at):
    """A few rows of floats times every token."""
    float_sums(s.tokens, s.input, s.input_stride, s.codes, s.codes_stride, rows_at, row_bytes,
               count, width, out_at, out_stride, room_at, scratch_at)  # fmt: skip


@kernel
def vocab_codes(s, first, last, acc_at):
    """Logits of ids first..last-1 for every token, from integers (SPEC 4.4)."""
    integer_rows(s, s.vocab_kind, s.vocab_weights, s.vocab_row_bytes, s.hidden, s.vocab_scale,
                 s.logits, 4 * s.vocab, first, last, acc_at)  # fmt: skip


@kernel
def vocab_floats(s, first, last, scratch_at, room_at):
    """Logits of ids first..last-1 for every token, from floats (SPEC 4.5)."""
    rows_at, out_at = s.vocab_weights + first * s.vocab_row_bytes, s.logits + 4 * first
    if s.vocab_kind == FLOAT32:
        times_floats(s, rows_at, s.vocab_row_bytes, last - first, s.hidden, out_at, 4 * s.vocab,
                     scratch_at, room_at)  # fmt: skip
        return
    size = 4 * s.hidden
    for start in range(0, last - first, WIDENED):
        count = min(WIDENED, last - first - start)
        for r in range(count):
            row_at = rows_at + (start + r) * s.vocab_row_bytes
            if s.vocab_kind == FLOAT16:
                widen(row_at, room_at + r * size, s.hidden)
            else:
                widen_bfloat16(row_at, room_at + r * size, s.hidden)
        times_floats(s, room_at, size, count, s.hidden, out_at + 4 * start, 4 * s.vocab,
                     scratch_at, room_at + WIDENED * size)  # fmt: skip


@kernel
def int8_rows(s, p, first, last, acc_at):
    """Rows first..last-1 of a product of int8 rows, for every token (SPEC 4.8, 4.6)."""
    weights_at = s.weights + s.layer * s.layer_bytes + p.weights
    scales_at = s.params + s.layer * s.params_stride + 4 * p.alphas
    integer_rows(s, INT8, weights_at, p.row_bytes, p.width, scales_at, p.out, p.out_stride, first,
                 last, acc_at)  # fmt: skip
    if s.squared:
        for t in range(s.tokens):
            relu2(p.out + t * p.out_stride + 4 * first, last - first)
            if IN_HALVES and s.apart:
                other, other_last = apart_from(s, first, last)
                relu2(p.out + 4 * other, other_last - other)


@kernel
def integer_rows(
    s, kind, weights_at, row_bytes, width, scales_at, out_at, out_stride, first, last, acc_at
):
    """Rows of 8, 6 or 4 bits with a scale each (SPEC 4.4); `first` is a multiple of TILE_ROWS.

    And those apart from them, if the part has such.
    """
    offset = OFFSET4 if kind == INT4 else (OFFSET6 if kind == INT6 else OFFSET8)
    for start in range(first, last, BAND):
        stop = min(start + BAND, last)
        integer_sums(s, kind, weights_at, row_bytes, width, start, stop, acc_at)
        scale_codes(s, offset, scales_at, out_at, out_stride, start, stop, acc_at)
        if IN_HALVES and s.apart:
            other, other_stop = apart_from(s, start, stop)
            scale_codes(s, offset, scales_at, out_at, out_stride, other, other_stop,
                        acc_at + ACC_STRIDE)  # fmt: skip


@kernel
def integer_sums(s, kind, weights_at, row_bytes, width, start, stop, acc_at):
    """Sums of a band of rows of 8, 6 or 4 bits with every token, and of those apart from them."""
    size, units = TILE_ROWS * row_bytes, (width + VOCAB_COLUMNS - 1) // VOCAB_COLUMNS
    tiles_at, tiles = weights_at + start * row_bytes, tiles_of(start, stop)
    if IN_HALVES and s.apart:
        other, other_stop = apart_from(s, start, stop)
        vocab_sums_of_halves(kind, tiles, tiles_at, tiles_of(other, other_stop),
                             weights_at + other * row_bytes, size, units, s.codes,
                             acc_at)  # fmt: skip
    else:
        vocab_sums(kind, s.tokens, tiles_at, tiles, size, units, s.codes, s.codes_stride, acc_at)


@kernel
def scale_codes(s, offset, scales_at, out_at, out_stride, start, stop, acc_at):
    """Results start..stop-1 of rows of 8, 6 or 4 bits from their sums, for every token."""
    steps, sums, n = floats(s.steps, s.tokens), int32s(s.sums, s.tokens), stop - start
    scale = floats(scales_at + 4 * start, n)
    for t in range(s.tokens):
        step, total = steps[t], np.int32(offset * sums[t])
        z = floats(out_at + t * out_stride + 4 * start, n)
        acc = int32s(acc_at + t * ACC_STRIDE, n)
        for i in range(n):
            z[i] = f32(np.int32(acc[i] - total)) * (step * scale[i])
