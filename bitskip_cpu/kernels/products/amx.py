"""Sums of code products by Intel's matrix unit (AMX-INT8): tdpbsud, 16 x 16 x 64 at a time.

Sixteen lines of an unpacked tile (4 columns x 16 rows each) are just what the unit takes as its
second operand; the first is 16 tokens x 64 activation codes. Eight tile registers hold 2 x 2
accumulators and two of each operand. Products are exact: 64 terms of at most 2 * 127, in int32.
Which kernel serves how many tokens stands at the end; the fewest are `simd`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from bitskip_cpu.isa import PATH
from bitskip_cpu.kernels.layout import ACC_STRIDE
from bitskip_cpu.kernels.numba_inside.decorators import intrinsic, kernel
from bitskip_cpu.kernels.numba_inside.emit import BYTE, LONG, call, constant_bytes, loop, pointer
from bitskip_cpu.kernels.products.dot import INTS, Kernel
from bitskip_cpu.kernels.products.float_simd import float_sums as float_sums
from bitskip_cpu.kernels.products.float_simd import order as order
from bitskip_cpu.kernels.products.simd import by_panels, packed_sums, vocab_sums_with
from bitskip_cpu.kernels.products.simd import ternary_sums_of_halves as ternary_sums_of_halves
from bitskip_cpu.kernels.products.simd import vocab_sums_of_halves as vocab_sums_of_halves
from bitskip_cpu.kernels.products.ternary_layout import (
    COLUMNS,
    LINE,
    LINE_COLUMNS,
    TILE_ROWS,
    UNIT_COLUMNS,
    UNIT_LINES,
)
from bitskip_cpu.kernels.products.ternary_simd import unpack_tile

PANEL_TILES, PANEL_TOKENS = 2, 32
DEPTH = PATH.columns  # that an instruction takes; codes and unpacked tiles are padded to it


def matrix(builder: ir.IRBuilder, name: str, *args: ir.Value) -> None:
    """Emit an instruction of the matrix unit."""
    call(builder, f"llvm.x86.{name}", ir.VoidType(), *args)


def address(builder: ir.IRBuilder, base: ir.Value, offset: ir.Value | int) -> ir.Value:
    """base + offset bytes, as a pointer."""
    at = builder.add(base, LONG(offset) if isinstance(offset, int) else offset)
    return pointer(builder, at, BYTE)


def configuration(name: str, rows: Sequence[int]) -> Any:
    """An intrinsic that gives this thread tile registers of `rows` rows of 64 bytes."""
    widths = [b for _ in range(8) for b in (64, 0)] + [0] * 16
    values = bytes([1] + [0] * 15 + widths + [*rows] + [0] * 8)

    @intrinsic()
    def configure(builder):
        matrix(builder, "ldtilecfg", constant_bytes(builder, name, values))

    return configure


configure_16 = configuration("bitskip_tiles_of_16_tokens", [16] * 8)
configure_4 = configuration("bitskip_tiles_of_4_tokens", [4] * 5 + [16] * 3)
configure_8 = configuration("bitskip_tiles_of_8_tokens", [8] * 5 + [16] * 3)


@intrinsic()
def release(builder):
    """Give the tile registers up, so that a change of threads need not save them."""
    matrix(builder, "tilerelease")


def bytes_tiles(adding: bool) -> Kernel:
    """As `ternary_simd.bytes_panel`; 32 tokens' codes must be readable, and sums writable.

    A second half of tokens or tiles that is not wanted is left out. `adding`: accumulate into out.
    """

    @intrinsic()
    def panel_sums(
        builder, tile, stride, last_tile, fours, codes, codes_stride, last, out, out_stride
    ):
        steps = builder.udiv(fours, LONG(DEPTH // 4))
        half = builder.mul(codes_stride, LONG(16))

        def panel(tokens: int, tiles: int) -> None:
            """`tokens`: 1 or 2 times 16; `tiles`: 1 or 2."""
            sums_at = []
            for i in range(tokens):
                for j in range(tiles):
                    at = builder.add(builder.mul(out_stride, LONG(16 * i)), LONG(64 * j))
                    sums_at.append(address(builder, out, at))
            for total, at in enumerate(sums_at):
                if adding:
                    matrix(builder, "tileloadd64", BYTE(total), at, out_stride)
                else:
                    matrix(builder, "tilezero", BYTE(total))
            with loop(builder, steps) as index:
                for i in range(tokens):
                    at = builder.add(builder.mul(half, LONG(i)), builder.mul(index, LONG(DEPTH)))
                    source = address(builder, codes, at)
                    matrix(builder, "tileloadd64", BYTE(4 + i), source, codes_stride)
                for j in range(tiles):
                    at = builder.add(
                        builder.mul(stride, LONG(j)), builder.mul(index, LONG(16 * LINE))
                    )
                    source = address(builder, tile, at)
                    matrix(builder, "tileloadd64", BYTE(6 + j), source, LONG(64))
                for i in range(tokens):
                    for j in range(tiles):
                        total = BYTE(i * tiles + j)
                        matrix(builder, "tdpbsud", total, BYTE(4 + i), BYTE(6 + j))
            for total, at in enumerate(sums_at):
                matrix(builder, "tilestored64", BYTE(total), at, out_stride)

        def by_tiles(tokens: int) -> None:
            two = builder.icmp_signed(">", last_tile, LONG(0))
            with builder.if_else(two) as (both, one):
                with both:
                    panel(tokens, 2)
                with one:
                    panel(tokens, 1)

        with builder.if_else(builder.icmp_signed(">=", last, LONG(16))) as (both, one):
            with both:
                by_tiles(2)
            with one:
                by_tiles(1)

    return panel_sums


bytes_panel, add_panel = bytes_tiles(adding=False), bytes_tiles(adding=True)

PIECE_UNITS = 4  # of two tiles, unpacked, they leave the first cache room for codes and sums
PIECE_COLUMNS = PIECE_UNITS * UNIT_COLUMNS
PIECE_BYTES = (PIECE_COLUMNS + DEPTH) * TILE_ROWS  # of one tile; the last piece has the tail


@kernel
def many_tokens(
    tokens, tiles_at, tiles, size, units, tail, padded, codes_at, stride, acc_at, room_at
):
    """Sums of up to four packed tiles of `size` bytes with many tokens.

    A piece of two tiles is unpacked and multiplied with all tokens before the next: it stays in the
    first cache, where whole tiles would go through the second. `room_at` has 2 * PIECE_BYTES.
    """
    pieces = max(1, (units + PIECE_UNITS - 1) // PIECE_UNITS)
    configure_16()
    for i in range(0, tiles, PANEL_TILES):
        count = min(PANEL_TILES, tiles - i)
        for p in range(pieces):
            last, first = p == pieces - 1, p * PIECE_COLUMNS
            whole = units - p * PIECE_UNITS if last else PIECE_UNITS
            for j in range(count):
                at = tiles_at + (i + j) * size + p * PIECE_UNITS * UNIT_LINES * LINE
                unpack_tile(at, whole, tail if last else 0, room_at + j * PIECE_BYTES)
            fours = (padded - first if last else PIECE_COLUMNS) // COLUMNS
            for t in range(0, tokens, PANEL_TOKENS):
                codes, to = codes_at + t * stride + first, acc_at + t * ACC_STRIDE
                to, left = to + 4 * TILE_ROWS * i, tokens - 1 - t
                if p:
                    add_panel(room_at, PIECE_BYTES, count - 1, fours, codes, stride, left, to,
                              ACC_STRIDE)  # fmt: skip
                else:
                    bytes_panel(room_at, PIECE_BYTES, count - 1, fours, codes, stride, left, to,
                                ACC_STRIDE)  # fmt: skip
    release()


CHAINS = 3  # accumulators of a tile: a product's result is there after three others
FEW_UNITS = 2  # unpacked at a time, while those before them are multiplied
FEW_COLUMNS = FEW_UNITS * UNIT_COLUMNS
FEW_DEPTHS = 4  # at most: so many units and a tail
FEW_BYTES = FEW_DEPTHS * DEPTH * TILE_ROWS
SUMS_BYTES = 1024 * CHAINS  # of a tile


@intrinsic()
def clear(builder):
    """Set the accumulators to 0, before `add_few`."""
    for i in range(CHAINS):
        matrix(builder, "tilezero", BYTE(i))


@intrinsic()
def add_few(builder, tile, depths, codes, codes_stride):
    """Add 1..FEW_DEPTHS times 64 columns of an unpacked tile with few tokens (`configure_*`)."""
    for i in range(FEW_DEPTHS):
        with builder.if_then(builder.icmp_signed(">", depths, LONG(i)), likely=True):
            a, b = BYTE(CHAINS + i % 2), BYTE(CHAINS + 2 + i % 3)
            matrix(builder, "tileloadd64", a, address(builder, codes, i * DEPTH), codes_stride)
            matrix(builder, "tileloadd64", b, address(builder, tile, i * 16 * LINE), LONG(64))
            matrix(builder, "tdpbsud", BYTE(i % CHAINS), a, b)


@intrinsic()
def store_few(builder, out):
    """Store the accumulators, one behind the other, 1 KiB each."""
    for i in range(CHAINS):
        matrix(builder, "tilestored64", BYTE(i), address(builder, out, 1024 * i), LONG(64))


@intrinsic()
def add_chains(builder, sums, tokens, out, out_stride):
    """Add up what `store_few` stored: a tile's rows side by side for each token."""
    with loop(builder, tokens) as index:
        at = builder.add(sums, builder.mul(index, LONG(64)))
        total = ir.Constant(INTS, [0] * TILE_ROWS)
        for i in range(CHAINS):
            part = pointer(builder, builder.add(at, LONG(1024 * i)), INTS)
            total = builder.add(total, builder.load(part, align=4))
        to = builder.add(out, builder.mul(index, out_stride))
        builder.store(total, pointer(builder, to, INTS), align=4)


@kernel
def few_tokens(tokens, tiles_at, tiles, size, units, tail, codes_at, stride, acc_at, room_at):
    """Sums of up to four packed tiles of `size` bytes with up to 16 tokens, one tile after another.

    Memory is read in order. The matrix unit can only load what has left the store buffer, so a
    piece of a tile is unpacked before the piece ahead of it is multiplied, and sums are added when
    all are stored. `room_at` has 2 * FEW_BYTES + 4 * SUMS_BYTES.
    """
    if tokens <= 4:
        configure_4()
    elif tokens <= 8:
        configure_8()
    else:
        configure_16()
    pieces = max(1, (units + FEW_UNITS - 1) // FEW_UNITS)
    last_units = units - (pieces - 1) * FEW_UNITS
    last_depths = (last_units * UNIT_COLUMNS + tail * LINE_COLUMNS + DEPTH - 1) // DEPTH
    sums_at, slot = room_at + 2 * FEW_BYTES, 0
    clear()
    for tile in range(tiles + 1):
        at = tiles_at + tile * size
        for p in range(pieces if tile < tiles else 1):
            to, waiting = room_at + slot, room_at + FEW_BYTES - slot
            if tile < tiles:
                last = p == pieces - 1
                unpack_tile(at, last_units if last else FEW_UNITS, tail if last else 0, to)
            if p:
                add_few(waiting, FEW_COLUMNS // DEPTH, codes_at + (p - 1) * FEW_COLUMNS, stride)
            elif tile:  # what waits is the last piece of the tile before
                add_few(waiting, last_depths, codes_at + (pieces - 1) * FEW_COLUMNS, stride)
                store_few(sums_at + (tile - 1) * SUMS_BYTES)
                clear()
            at += FEW_UNITS * UNIT_LINES * LINE
            slot = FEW_BYTES - slot
    release()
    for tile in range(tiles):
        add_chains(sums_at + tile * SUMS_BYTES, tokens, acc_at + 4 * TILE_ROWS * tile, ACC_STRIDE)


UNPACK_ABOVE, (FEW_ABOVE, FEW_ABOVE_SHORT) = PATH.unpack_above, PATH.few_above
LONG_ROW = 8  # units
panels = by_panels(bytes_panel, PANEL_TILES, PANEL_TOKENS)


@kernel
def ternary_sums(
    tokens, tiles_at, tiles, size, units, tail, padded, codes_at, stride, acc_at, room_at
):
    """As `simd.ternary_sums`."""
    if tokens > UNPACK_ABOVE:
        many_tokens(tokens, tiles_at, tiles, size, units, tail, padded, codes_at, stride, acc_at,
                    room_at)  # fmt: skip
    elif tokens > (FEW_ABOVE if units >= LONG_ROW else FEW_ABOVE_SHORT):
        few_tokens(tokens, tiles_at, tiles, size, units, tail, codes_at, stride, acc_at, room_at)
    else:
        packed_sums(tokens, tiles_at, tiles, size, units, tail, codes_at, stride, acc_at)


@kernel
def bytes_sums(tokens, tiles_at, tiles, size, fours, codes_at, stride, acc_at):
    """As `simd.bytes_sums`."""
    configure_16()
    panels(tokens, tiles_at, tiles, size, fours, codes_at, stride, acc_at)
    release()


vocab_sums = vocab_sums_with(bytes_sums)
