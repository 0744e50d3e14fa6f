"""`ternary_simd.bytes_tile` with Intel's matrix unit (AMX-INT8): tdpbsud, 16 x 16 x 64 at a time.

Sixteen lines of an unpacked tile (`tiles`: 4 columns x 16 rows each) are just what the unit takes
as its second operand; the first is 16 tokens x 64 activation codes. Eight tile registers hold 2 x 2
accumulators and two of each operand. Products are exact: 64 terms of at most 2 * 127, in int32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bitskip_cpu.kernels.dot_simd import BYTE, LONG
from bitskip_cpu.kernels.inner import inner
from bitskip_cpu.kernels.ternary_simd import unpack_tile
from bitskip_cpu.kernels.tiles import LINE, LINE_COLUMNS, TILE_ROWS, UNIT_COLUMNS, UNIT_LINES

BLOCK_TILES, BLOCK_TOKENS = 2, 32
STEP = 64  # columns; activation codes and unpacked tiles are padded to it


def call(builder: ir.IRBuilder, name: str, *args: ir.Value) -> None:
    """An instruction of the matrix unit."""
    kind = ir.FunctionType(ir.VoidType(), [a.type for a in args])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}")
    builder.call(function, args)


def address(builder: ir.IRBuilder, base: ir.Value, offset: ir.Value | int) -> ir.Value:
    """base + offset bytes, as a pointer."""
    at = builder.add(base, LONG(offset) if isinstance(offset, int) else offset)
    return builder.inttoptr(at, BYTE.as_pointer())


def settings(name: str, rows: Sequence[int]) -> Any:
    """An intrinsic that sets this thread's tile registers up: their rows, of 64 bytes each."""
    widths = [b for _ in range(8) for b in (64, 0)] + [0] * 16
    values = bytes([1] + [0] * 15 + widths + [*rows] + [0] * 8)

    @intrinsic
    def begin(typing: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            memory = cgutils.global_constant(builder, name, cgutils.make_bytearray(values))
            call(builder, "ldtilecfg", builder.bitcast(memory, BYTE.as_pointer()))
            return context.get_dummy_value()

        return types.void(), codegen

    return begin


begin_blocks = settings("bitskip_tiles_of_blocks", [16] * 8)
begin_8 = settings("bitskip_tiles_of_8_tokens", [8] * 5 + [16] * 3)


@intrinsic
def end_blocks(typing: Any) -> Any:
    """Give the tile registers up, so that a change of threads need not save them."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def bytes_block(
    typing: Any, tile: Any, stride: Any, last_tile: Any, fours: Any, codes: Any,
    codes_stride: Any, last: Any, out: Any, out_stride: Any,
) -> Any:  # fmt: skip
    """As `ternary_simd.bytes_block`; 32 tokens' codes must be readable, and sums writable.

    A second half of tokens or tiles that is not wanted is left out.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        tile, stride, last_tile, fours, codes, codes_stride, last, out, out_stride = args
        steps = builder.udiv(fours, LONG(STEP // 4))
        half = builder.mul(codes_stride, LONG(16))

        def block(tokens: int, tiles: int) -> None:
            """`tokens` and `tiles`: groups of 16, 1 or 2."""
            for i in range(tokens * tiles):
                call(builder, "tilezero", BYTE(i))
            with cgutils.for_range(builder, steps) as loop:
                for i in range(tokens):
                    at = builder.add(
                        builder.mul(half, LONG(i)), builder.mul(loop.index, LONG(STEP))
                    )
                    source = address(builder, codes, at)
                    call(builder, "tileloadd64", BYTE(4 + i), source, codes_stride)
                for j in range(tiles):
                    at = builder.add(
                        builder.mul(stride, LONG(j)), builder.mul(loop.index, LONG(16 * LINE))
                    )
                    call(builder, "tileloadd64", BYTE(6 + j), address(builder, tile, at), LONG(64))
                for i in range(tokens):
                    for j in range(tiles):
                        total = BYTE(i * tiles + j)
                        call(builder, "tdpbsud", total, BYTE(4 + i), BYTE(6 + j))
            for i in range(tokens):
                for j in range(tiles):
                    at = builder.add(builder.mul(out_stride, LONG(16 * i)), LONG(64 * j))
                    target = address(builder, out, at)
                    call(builder, "tilestored64", BYTE(i * tiles + j), target, out_stride)

        def by_tiles(tokens: int) -> None:
            two = builder.icmp_signed(">", last_tile, LONG(0))
            with builder.if_else(two) as (both, one):
                with both:
                    block(tokens, 2)
                with one:
                    block(tokens, 1)

        with builder.if_else(builder.icmp_signed(">=", last, LONG(16))) as (both, one):
            with both:
                by_tiles(2)
            with one:
                by_tiles(1)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9), codegen


@intrinsic
def clear(typing: Any) -> Any:
    """Four accumulators of zeros, before `few_steps`."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        for i in range(4):
            call(builder, "tilezero", BYTE(i))
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def few_steps(typing: Any, tiles: Any, stride: Any, steps: Any, codes: Any, row: Any) -> Any:
    """Add `steps` times 64 columns of four unpacked tiles with up to 8 or 16 tokens (`begin_*`).

    tiles, `stride` bytes apart; codes, `row` bytes a token.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        tiles, stride, steps, codes, row = args
        with cgutils.for_range(builder, steps) as loop:
            source = address(builder, codes, builder.mul(loop.index, LONG(STEP)))
            call(builder, "tileloadd64", BYTE(4), source, row)
            for j in range(4):
                at = builder.mul(loop.index, LONG(16 * LINE))
                at = builder.add(at, builder.mul(stride, LONG(j)))
                operand = BYTE(5 + j % 3)
                call(builder, "tileloadd64", operand, address(builder, tiles, at), LONG(64))
                call(builder, "tdpbsud", BYTE(j), BYTE(4), operand)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@intrinsic
def store_few(typing: Any, out: Any, out_stride: Any) -> Any:
    """The sums of four tiles, side by side for each token; 8 or 16 tokens are written."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        out, out_stride = args
        for j in range(4):
            call(builder, "tilestored64", BYTE(j), address(builder, out, 64 * j), out_stride)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


FEW_UNITS = 4  # unpacked at a time: 384 columns of four tiles, which stay in the first cache
FEW_COLUMNS = FEW_UNITS * UNIT_COLUMNS
FEW_BYTES = TILE_ROWS * FEW_COLUMNS


@inner
def few_block(tokens, tiles_at, tiles, size, units, tail, codes_at, row, out_at, out_stride, room):
    """Sums of up to four packed tiles of `size` bytes with up to 16 tokens.

    `room` holds 4 * FEW_BYTES; four tiles and 8 or 16 tokens are written.
    """
    if tokens <= 8:
        begin_8()
    else:
        begin_blocks()
    clear()
    for first in range(0, units + (tail > 0), FEW_UNITS):
        count = min(FEW_UNITS, units - first)
        rest = tail if first + FEW_UNITS > units else 0
        for i in range(tiles):
            at = tiles_at + i * size + first * UNIT_LINES * LINE
            unpack_tile(at, count, rest, room + i * FEW_BYTES)
        columns = count * UNIT_COLUMNS + rest * LINE_COLUMNS
        steps = (columns + STEP - 1) // STEP
        few_steps(room, FEW_BYTES, steps, codes_at + first * UNIT_COLUMNS, row)
    store_few(out_at, out_stride)
    end_blocks()
