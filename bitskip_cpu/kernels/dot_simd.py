"""Exact integer products of 8-bit codes as LLVM IR (SPEC 4.3, 4.4).

Every kernel multiplies unsigned bytes by signed bytes and adds groups of four products to 32-bit
lanes; the paths differ only in the register width and in `dot`, the instruction for that:

    dotprod            sdot, of two signed operands: packed codes are at most 63

    vnni512, vnni256   vpdpbusd, which cannot saturate
    avx2               vpmaddubsw, vpmaddwd: pairs of products must fit 16 bits. The largest pair is
                       2 * 128 * 127 = 32512 (a packed code 2 in the top plane, unshifted).

A kernel computes a tile of R rows x C columns of products. Its arguments are (rows address, row
stride, last row, columns address, column stride, last column, steps, out address, out stride).
Rows above `last row` repeat it, so that a tile at the border needs no code of its own. The int32
sums of one token lie side by side, the next token's `out stride` bytes further: tokens are the
columns, and in the head kernels (`by_row`) the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bitskip_cpu.isa import PATH
from bitskip_cpu.kernels.memory import emit_prefetch, vector_pointer

FAR, NEAR = 8192, 1280  # bytes; measured
WIDTH = {"vnni256": 32, "avx2": 32, "dotprod": 16}.get(PATH, 64)  # bytes in a register
BYTE, WORD, INT, LONG = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
BYTES = ir.VectorType(BYTE, WIDTH)
WORDS = ir.VectorType(WORD, WIDTH // 2)
INTS = ir.VectorType(INT, WIDTH // 4)


def splat(kind: ir.VectorType, value: int) -> ir.Constant:
    """A vector of equal constants."""
    return ir.Constant(kind, [value] * kind.count)


def call_llvm(builder: ir.IRBuilder, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
    """An LLVM intrinsic."""
    kind = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def dot(builder: ir.IRBuilder, total: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
    """total int32 lanes + sums of four u8 * s8 products each."""
    if PATH == "avx2":
        pairs = call_llvm(builder, "llvm.x86.avx2.pmadd.ub.sw", WORDS, u, s)
        fours = call_llvm(builder, "llvm.x86.avx2.pmadd.wd", INTS, pairs, splat(WORDS, 1))
        return builder.add(total, fours)
    if PATH == "dotprod":
        return call_llvm(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", INTS, total, u, s)
    name = f"llvm.x86.avx512.vpdpbusd.{WIDTH * 8}"
    return call_llvm(builder, name, INTS, total, builder.bitcast(u, INTS), builder.bitcast(s, INTS))


def lane_sums(builder: ir.IRBuilder, parts: list[ir.Value]) -> ir.Value:
    """n vectors -> one vector <n x i32> of the sums of their lanes (n a power of two)."""

    def neighbours(a: ir.Value, b: ir.Value, count: int) -> ir.Value:
        halves = [
            builder.shuffle_vector(
                a, b, ir.Constant(ir.VectorType(INT, count), list(range(first, 2 * count, 2)))
            )
            for first in (0, 1)
        ]
        return builder.add(*halves)

    lanes, n = INTS.count, len(parts)
    while len(parts) > 1:
        parts = [neighbours(a, b, lanes) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    result = parts[0]
    while lanes > n:
        lanes //= 2
        result = neighbours(result, result, lanes)
    return result


def starts(
    builder: ir.IRBuilder, base: ir.Value, stride: ir.Value, last: ir.Value, count: int
) -> list[ir.Value]:
    """base, base + stride, ...; those above the last one repeat it."""
    found = [base]
    for i in range(1, count):
        inside = builder.icmp_signed("<=", LONG(i), last)
        found.append(builder.select(inside, builder.add(found[-1], stride), found[-1]))
    return found


Tile = Callable[..., None]


def tile(tokens: int, rows: int, step: Callable[..., None]) -> Tile:
    """An intrinsic that runs `step` along a tile and stores the sums (module docstring)."""

    @intrinsic
    def kernel(
        typing: Any, a: Any, a_stride: Any, a_last: Any, b: Any, b_stride: Any, b_last: Any,
        steps: Any, out: Any, out_stride: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            a, a_stride, a_last, b, b_stride, b_last, steps, out, out_stride = args
            token_at = starts(builder, a, a_stride, a_last, tokens)
            row_at = starts(builder, b, b_stride, b_last, rows)
            count = tokens * rows
            totals = [cgutils.alloca_once_value(builder, splat(INTS, 0)) for _ in range(count)]
            with cgutils.for_range(builder, steps) as loop:
                step(builder, loop.index, token_at, row_at, totals)
            for i in range(tokens):
                line = [builder.load(total) for total in totals[i * rows : (i + 1) * rows]]
                result = lane_sums(builder, line)
                builder.store(result, vector_pointer(builder, out, result.type), align=4)
                out = builder.add(out, out_stride)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), codegen

    return kernel  # type: ignore[no-any-return]


def load(builder: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    """WIDTH bytes at base + offset."""
    pointer = vector_pointer(builder, builder.add(base, offset), BYTES)
    return builder.load(pointer, align=1)


def prefetch(builder: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> None:
    """Ask for the bytes FAR further on in the second cache, NEAR further on in the first.

    Without it, memory is read at half its speed.
    """
    at = builder.add(base, offset)
    for distance, level in ((FAR, 2), (NEAR, 3)):
        emit_prefetch(builder, builder.add(at, LONG(distance)), level)


def add_to(builder: ir.IRBuilder, total: ir.Value, u: ir.Value, s: ir.Value) -> None:
    """`dot` onto an accumulator in memory (which LLVM keeps in a register)."""
    builder.store(dot(builder, builder.load(total), u, s), total)


def head_step(
    builder: ir.IRBuilder, index: ir.Value, rows: list[Any], columns: list[Any], totals: list[Any]
) -> None:
    """64 activation codes of each row (a token) with 64 codes of each column (a head's row).

    With vpdpbusd the activations come with ACTIVATION_OFFSET added. On AVX2 such bytes would
    overflow 16 bits, so signs move to the activations: |w| * (a * sign w), both at most 127.
    """
    start = builder.mul(index, LONG(64))
    for column in columns:
        prefetch(builder, column, start)
    for part in range(0, 64, WIDTH):
        at = builder.add(start, LONG(part))
        activations = [load(builder, row, at) for row in rows]
        for j, column in enumerate(columns):
            weights = load(builder, column, at)
            if PATH != "avx2":
                for i, row in enumerate(activations):
                    add_to(builder, totals[i * len(columns) + j], row, weights)
                continue
            size = call_llvm(builder, "llvm.x86.avx2.psign.b", BYTES, weights, weights)
            for i, row in enumerate(activations):
                turned = call_llvm(builder, "llvm.x86.avx2.psign.b", BYTES, row, weights)
                add_to(builder, totals[i * len(columns) + j], size, turned)


head_1x4, head_2x4, head_4x4 = (tile(n, 4, head_step) for n in (1, 2, 4))
