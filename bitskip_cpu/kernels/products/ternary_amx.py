"""`ternary_simd.bytes_tile` with Intel's matrix unit (AMX-INT8): tdpbsud, 16 x 16 x 64 at a time.

Sixteen lines of an unpacked tile (`tiles`: 4 columns x 16 rows each) are just what the unit takes
as its second operand; the first is 16 tokens x 64 activation codes. Eight tile registers hold 2 x 2
accumulators and two of each operand. Products are exact: 64 terms of at most 2 * 127, in int32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from bitskip_cpu.kernels.numba_inside.decorators import intrinsic, kernel
from bitskip_cpu.kernels.numba_inside.emit import BYTE, LONG, call, constant_bytes, loop, pointer
from bitskip_cpu.kernels.products.dot import INTS, Tile
from bitskip_cpu.kernels.products.ternary_layout import (
    COLUMNS,
    LINE,
    LINE_COLUMNS,
    TILE_ROWS,
    UNIT_COLUMNS,
    UNIT_LINES,
)
from bitskip_cpu.kernels.products.ternary_simd import unpack_tile

BLOCK_TILES, BLOCK_TOKENS = 2, 32
STEP = 64  # columns; activation codes and unpacked tiles are padded to it


def unit(builder: ir.IRBuilder, name: str, *args: ir.Value) -> None:
    """An instruction of the matrix unit."""
    call(builder, f"llvm.x86.{name}", ir.VoidType(), *args)


def address(builder: ir.IRBuilder, base: ir.Value, offset: ir.Value | int) -> ir.Value:
    """base + offset bytes, as a pointer."""
    at = builder.add(base, LONG(offset) if isinstance(offset, int) else offset)
    return pointer(builder, at, BYTE)


def settings(name: str, rows: Sequence[int]) -> Any:
    """An intrinsic that sets this thread's tile registers up: their rows, of 64 bytes each."""
    widths = [b for _ in range(8) for b in (64, 0)] + [0] * 16
    values = bytes([1] + [0] * 15 + widths + [*rows] + [0] * 8)

    @intrinsic()
    def begin(builder):
        unit(builder, "ldtilecfg", constant_bytes(builder, name, values))

    return begin


begin_blocks = settings("bitskip_tiles_of_blocks", [16] * 8)
begin_4 = settings("bitskip_tiles_of_4_tokens", [4] * 5 + [16] * 3)
begin_8 = settings("bitskip_tiles_of_8_tokens", [8] * 5 + [16] * 3)


@intrinsic()
def end_blocks(builder):
    """Give the tile registers up, so that a change of threads need not save them."""
    unit(builder, "tilerelease")


def bytes_kernel(adding: bool) -> Tile:
    """As `ternary_simd.bytes_block`; 32 tokens' codes must be readable, and sums writable.

    A second half of tokens or tiles that is not wanted is left out. `adding`: to what is there.
    """

    @intrinsic()
    def block_sums(
        builder, tile, stride, last_tile, fours, codes, codes_stride, last, out, out_stride
    ):
        steps = builder.udiv(fours, LONG(STEP // 4))
        half = builder.mul(codes_stride, LONG(16))

        def block(tokens: int, tiles: int) -> None:
            """`tokens` and `tiles`: groups of 16, 1 or 2."""
            sums_at = []
            for i in range(tokens):
                for j in range(tiles):
                    at = builder.add(builder.mul(out_stride, LONG(16 * i)), LONG(64 * j))
                    sums_at.append(address(builder, out, at))
            for total, at in enumerate(sums_at):
                if adding:
                    unit(builder, "tileloadd64", BYTE(total), at, out_stride)
                else:
                    unit(builder, "tilezero", BYTE(total))
            with loop(builder, steps) as index:
                for i in range(tokens):
                    at = builder.add(builder.mul(half, LONG(i)), builder.mul(index, LONG(STEP)))
                    source = address(builder, codes, at)
                    unit(builder, "tileloadd64", BYTE(4 + i), source, codes_stride)
                for j in range(tiles):
                    at = builder.add(
                        builder.mul(stride, LONG(j)), builder.mul(index, LONG(16 * LINE))
                    )
                    source = address(builder, tile, at)
                    unit(builder, "tileloadd64", BYTE(6 + j), source, LONG(64))
                for i in range(tokens):
                    for j in range(tiles):
                        total = BYTE(i * tiles + j)
                        unit(builder, "tdpbsud", total, BYTE(4 + i), BYTE(6 + j))
            for total, at in enumerate(sums_at):
                unit(builder, "tilestored64", BYTE(total), at, out_stride)

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

    return block_sums


bytes_block, more_block = bytes_kernel(adding=False), bytes_kernel(adding=True)

PIECE_UNITS = 4  # of two tiles, unpacked, they leave the first cache room for codes and sums
PIECE_COLUMNS = PIECE_UNITS * UNIT_COLUMNS
PIECE_BYTES = (PIECE_COLUMNS + STEP) * TILE_ROWS  # of one tile; the last piece has the tail


@kernel
def many_block(
    tokens, tiles_at, tiles, size, units, tail, padded, codes_at, row, out_at, out_stride, room
):
    """Sums of up to four packed tiles of `size` bytes with many tokens.

    A piece of two tiles is unpacked and multiplied with all tokens before the next: it stays in the
    first cache, where whole tiles would go through the second. `room` holds 2 * PIECE_BYTES.
    """
    pieces = max(1, (units + PIECE_UNITS - 1) // PIECE_UNITS)
    begin_blocks()
    for i in range(0, tiles, BLOCK_TILES):
        count = min(BLOCK_TILES, tiles - i)
        for p in range(pieces):
            last, first = p == pieces - 1, p * PIECE_COLUMNS
            whole = units - p * PIECE_UNITS if last else PIECE_UNITS
            for j in range(count):
                at = tiles_at + (i + j) * size + p * PIECE_UNITS * UNIT_LINES * LINE
                unpack_tile(at, whole, tail if last else 0, room + j * PIECE_BYTES)
            fours = (padded - first if last else PIECE_COLUMNS) // COLUMNS
            for t in range(0, tokens, BLOCK_TOKENS):
                codes, to = codes_at + t * row + first, out_at + t * out_stride + 4 * TILE_ROWS * i
                left = tokens - 1 - t
                if p:
                    more_block(
                        room, PIECE_BYTES, count - 1, fours, codes, row, left, to, out_stride
                    )
                else:
                    bytes_block(
                        room, PIECE_BYTES, count - 1, fours, codes, row, left, to, out_stride
                    )
    end_blocks()


CHAINS = 3  # accumulators of a tile: a product's result is there after three others
FEW_UNITS = 2  # unpacked at a time, while those before them are multiplied
FEW_COLUMNS = FEW_UNITS * UNIT_COLUMNS
FEW_STEPS = 4  # at most: so many units and a tail
FEW_BYTES = FEW_STEPS * STEP * TILE_ROWS
SUMS_BYTES = 1024 * CHAINS  # of a tile


@intrinsic()
def clear(builder):
    """Accumulators of zeros, before `few_steps`."""
    for i in range(CHAINS):
        unit(builder, "tilezero", BYTE(i))


@intrinsic()
def few_steps(builder, tile, steps, codes, row):
    """Add 1..FEW_STEPS times 64 columns of an unpacked tile with few tokens (`begin_*`).
    codes: `row` bytes a token.
    """
    for i in range(FEW_STEPS):
        with builder.if_then(builder.icmp_signed(">", steps, LONG(i)), likely=True):
            a, b = BYTE(CHAINS + i % 2), BYTE(CHAINS + 2 + i % 3)
            unit(builder, "tileloadd64", a, address(builder, codes, i * STEP), row)
            unit(builder, "tileloadd64", b, address(builder, tile, i * 16 * LINE), LONG(64))
            unit(builder, "tdpbsud", BYTE(i % CHAINS), a, b)


@intrinsic()
def store_few(builder, out):
    """The accumulators, one behind the other, 1 KiB each."""
    for i in range(CHAINS):
        unit(builder, "tilestored64", BYTE(i), address(builder, out, 1024 * i), LONG(64))


@intrinsic()
def add_chains(builder, sums, tokens, out, out_stride):
    """What `store_few` stored, added up: a tile's rows side by side for each token."""
    with loop(builder, tokens) as index:
        at = builder.add(sums, builder.mul(index, LONG(64)))
        total = ir.Constant(INTS, [0] * TILE_ROWS)
        for i in range(CHAINS):
            part = pointer(builder, builder.add(at, LONG(1024 * i)), INTS)
            total = builder.add(total, builder.load(part, align=4))
        to = builder.add(out, builder.mul(index, out_stride))
        builder.store(total, pointer(builder, to, INTS), align=4)


@kernel
def few_block(tokens, tiles_at, tiles, size, units, tail, codes_at, row, out_at, out_stride, room):
    """Sums of up to four packed tiles of `size` bytes with up to 16 tokens, one tile after another.

    Memory is read in order. The matrix unit can only load what has left the store buffer, so a
    piece of a tile is unpacked before the piece ahead of it is multiplied, and sums are added when
    all are stored. `room` holds 2 * FEW_BYTES + 4 * SUMS_BYTES.
    """
    if tokens <= 4:
        begin_4()
    elif tokens <= 8:
        begin_8()
    else:
        begin_blocks()
    pieces = max(1, (units + FEW_UNITS - 1) // FEW_UNITS)
    last_units = units - (pieces - 1) * FEW_UNITS
    last_steps = (last_units * UNIT_COLUMNS + tail * LINE_COLUMNS + STEP - 1) // STEP
    sums_at, slot = room + 2 * FEW_BYTES, 0
    clear()
    for tile in range(tiles + 1):
        at = tiles_at + tile * size
        for p in range(pieces if tile < tiles else 1):
            to, waiting = room + slot, room + FEW_BYTES - slot
            if tile < tiles:
                last = p == pieces - 1
                unpack_tile(at, last_units if last else FEW_UNITS, tail if last else 0, to)
            if p:
                few_steps(waiting, FEW_COLUMNS // STEP, codes_at + (p - 1) * FEW_COLUMNS, row)
            elif tile:  # what waits is the last piece of the tile before
                few_steps(waiting, last_steps, codes_at + (pieces - 1) * FEW_COLUMNS, row)
                store_few(sums_at + (tile - 1) * SUMS_BYTES)
                clear()
            at += FEW_UNITS * UNIT_LINES * LINE
            slot = FEW_BYTES - slot
    end_blocks()
    for tile in range(tiles):
        add_chains(sums_at + tile * SUMS_BYTES, tokens, out_at + 4 * TILE_ROWS * tile, out_stride)
