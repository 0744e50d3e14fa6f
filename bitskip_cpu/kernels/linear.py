"""Rows of the linear layers and heads for all tokens at hand (SPEC 4.3 to 4.6)."""

from __future__ import annotations

import numpy as np

from bitskip_cpu.isa import PATH
from bitskip_cpu.kernels.floats import dot_tree, relu2, widen
from bitskip_cpu.kernels.inner import inner
from bitskip_cpu.kernels.layout import BAND, FLOAT16, INT8
from bitskip_cpu.kernels.memory import floats, int32s, uint8s

if PATH == "plain":
    from bitskip_cpu.kernels import dot_plain as dot
else:
    from bitskip_cpu.kernels import dot_simd as dot  # type: ignore[no-redef]

packed_4x1, packed_2x2, packed_1x4 = dot.packed_4x1, dot.packed_2x2, dot.packed_1x4
bytes_4x4, head_1x4, head_4x4 = dot.bytes_4x4, dot.head_1x4, dot.head_4x4
ACTIVATION_OFFSET = dot.ACTIVATION_OFFSET

f32 = np.float32
ACC_STRIDE = 4 * BAND


@inner
def unpack(row_at, row_bytes, out_at):
    """One packed row -> its codes 0, 1, 2 as bytes, 256 for 64 (FORMAT 2)."""
    for group in range(0, row_bytes, 64):
        packed = uint8s(row_at + group, 64)
        first, second = uint8s(out_at + 4 * group, 64), uint8s(out_at + 4 * group + 64, 64)
        third, fourth = uint8s(out_at + 4 * group + 128, 64), uint8s(out_at + 4 * group + 192, 64)
        for i in range(64):
            byte = packed[i]
            first[i] = np.uint8(byte & 3)
            second[i] = np.uint8((byte >> 2) & 3)
            third[i] = np.uint8((byte >> 4) & 3)
            fourth[i] = np.uint8(byte >> 6)


@inner
def ternary_sums(s, p, rows_at, count, acc_at, unpacked_at):
    """Sums of code products of `count` <= BAND rows: acc int32 [T, BAND]; weights count as w + 1.

    Few tokens multiply the packed rows; from five on, unpacking four rows once is cheaper.
    """
    tokens, size, steps = s.tokens, p.row_bytes, p.row_bytes // 64
    codes, stride, last = s.codes, s.codes_stride, s.tokens - 1
    for row in range(0, count, 4):
        at, to, above = rows_at + row * size, acc_at + 4 * row, count - 1 - row
        if tokens == 1:
            packed_4x1(at, size, above, codes, stride, 0, steps, to, ACC_STRIDE)
        elif tokens == 2:
            for i in range(0, min(4, above + 1), 2):
                packed_2x2(at + i * size, size, above - i, codes, stride, 1, steps,
                           to + 4 * i, ACC_STRIDE)  # fmt: skip
        elif tokens <= 4:
            for i in range(min(4, above + 1)):
                packed_1x4(at + i * size, size, 0, codes, stride, last, steps,
                           to + 4 * i, ACC_STRIDE)  # fmt: skip
        else:
            for i in range(min(4, above + 1)):
                unpack(at + i * size, size, unpacked_at + i * 4 * size)
            for t in range(0, tokens, 4):
                bytes_4x4(unpacked_at, 4 * size, above, codes + t * stride, stride, last - t,
                          4 * steps, to + t * ACC_STRIDE, ACC_STRIDE)  # fmt: skip


@inner
def ternary_rows(s, p, first, last, acc_at, unpacked_at):
    """Rows first..last-1 of one of the block's products, for every token (SPEC 4.3, 4.6)."""
    weights_at = s.weights + s.layer * s.layer_bytes + p.weights
    alphas = floats(s.params + s.layer * s.params_stride + 4 * p.alphas, 3)
    steps, sums = floats(s.steps, s.tokens), int32s(s.sums, s.tokens)
    for start in range(first, last, BAND):
        stop = min(start + BAND, last)
        rows_at = weights_at + start * p.row_bytes
        ternary_sums(s, p, rows_at, stop - start, acc_at, unpacked_at)
        for t in range(s.tokens):
            out_at = p.out + t * p.out_stride + 4 * start
            out = floats(out_at, stop - start)
            acc = int32s(acc_at + t * ACC_STRIDE, stop - start)
            step, total = steps[t], sums[t]
            begin = start
            for part in range(3):  # q, k, v or gate, up have each their own scale
                end = min(stop, p.end0 if part == 0 else (p.end1 if part == 1 else p.rows))
                scale = step * alphas[part]
                for i in range(begin - start, end - start):
                    out[i] = f32(np.int32(acc[i] - total)) * scale
                begin = max(begin, end)
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
