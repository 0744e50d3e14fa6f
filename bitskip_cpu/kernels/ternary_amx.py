"""`ternary_simd.bytes_tile` with Intel's matrix unit (AMX-INT8): tdpbsud, 16 x 16 x 64 at a time.

Sixteen lines of an unpacked tile (`tiles`: 4 columns x 16 rows each) are just what the unit takes
as its second operand; the first is 16 tokens x 64 activation codes. Eight tile registers hold 2 x 2
accumulators and two of each operand. Products are exact: 64 terms of at most 2 * 127, in int32.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bitskip_cpu.kernels.dot_simd import BYTE, LONG

BLOCK_TILES, BLOCK_TOKENS = 2, 32
STEP = 64  # columns; activation codes and unpacked tiles are padded to it
LINE = 64


def call(builder: ir.IRBuilder, name: str, *args: ir.Value) -> None:
    kind = ir.FunctionType(ir.VoidType(), [a.type for a in args])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}")
    builder.call(function, args)


def address(builder: ir.IRBuilder, base: ir.Value, offset: ir.Value | int) -> ir.Value:
    at = builder.add(base, LONG(offset) if isinstance(offset, int) else offset)
    return builder.inttoptr(at, BYTE.as_pointer())


@intrinsic
def begin_blocks(typing: Any) -> Any:
    """Set this thread's tile registers up: eight of 16 rows x 64 bytes."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        widths = [b for _ in range(8) for b in (64, 0)] + [0] * 16
        settings = bytes([1] + [0] * 15 + widths + [16] * 8 + [0] * 8)
        memory = cgutils.global_constant(
            builder, "bitskip_tile_settings", cgutils.make_bytearray(settings)
        )
        call(builder, "ldtilecfg", builder.bitcast(memory, BYTE.as_pointer()))
        return context.get_dummy_value()

    return types.void(), codegen


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
