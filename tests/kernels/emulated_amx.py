"""The loops of `products/amx.py` in Python, over a matrix unit made of NumPy.

`NUMBA_DISABLE_JIT=1 python -m tests.kernels.emulated_amx [PLANTED]` compares its sums with the
exact ones on any machine and prints how many were compared. What is emulated are the intrinsics;
PLANTED, a name of this module, forgets something on purpose.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from bitskip_cpu import isa

isa.PATH = next(path for path in isa.PATHS if path.matrix_unit)  # before any kernel is declared

from bitskip_cpu.kernels.layout import ACC_STRIDE, INT8  # noqa: E402
from bitskip_cpu.kernels.numba_inside.views import int8s, int32s, uint8s  # noqa: E402
from bitskip_cpu.kernels.products import (  # noqa: E402
    amx,
    rows,
    simd,
    ternary_layout,
    vocab_layout,
)
from bitskip_cpu.kernels.products.repack import repack  # noqa: E402
from bitskip_cpu.workspace import LEAST_ROOM  # noqa: E402
from bitskip_ref.packing import pack_ternary  # noqa: E402

LINE, TILE_ROWS = ternary_layout.LINE, ternary_layout.TILE_ROWS
PLANTED = sys.argv[1] if len(sys.argv) > 1 else ""


def unpack_tile(tile: int, units: int, tail: int, out: int) -> None:
    """As `ternary_simd.unpack_tile`, dense."""
    for unit in range(units + 1):
        count = 5 if unit < units else tail
        a = uint8s(tile + unit * 5 * LINE, count * LINE).reshape(count, LINE).astype(int)
        lines = a & 31
        if unit < units:
            x = a[0] >> 5 | (a[3] >> 6) << 3
            y = a[1] >> 5 | (a[4] >> 6) << 3
            z = a[2] >> 5 | (a[3] >> 5 & 1) << 3 | (a[4] >> 5 & 1) << 4
            lines = np.stack([*lines, x, y, z])
        planes = np.stack([lines // 3**p % 3 for p in range(3)], 1)
        uint8s(out + unit * 8 * 3 * LINE, planes.size)[:] = planes.reshape(-1)


def sums(tile: int, columns: int, codes: int, stride: int, tokens: int) -> np.ndarray:
    """Exact sums int32 [tokens, 16] of an unpacked tile's first columns."""
    weights = uint8s(tile, columns * TILE_ROWS).reshape(-1, TILE_ROWS, 4).transpose(0, 2, 1)
    x = np.stack([int8s(codes + t * stride, columns) for t in range(tokens)]).astype(np.int32)
    return x @ weights.reshape(columns, TILE_ROWS).astype(np.int32)


class Unit:
    """The tile registers: none without a configuration."""

    tokens = 0
    total: Any = None


def configured(tokens: int) -> Any:
    def configure() -> None:
        Unit.tokens, Unit.total = tokens, None

    return configure


def panel(adding: bool) -> Any:
    def panel_sums(
        tile: int, stride: int, last_tile: int, fours: int, codes: int, codes_stride: int,
        last: int, out: int, out_stride: int,
    ) -> None:  # fmt: skip
        assert Unit.tokens == 16, "not configured"
        for j in range(2 if last_tile > 0 else 1):
            tokens = 32 if last >= 16 else 16
            found = sums(tile + j * stride, fours * 4 // 64 * 64, codes, codes_stride, tokens)
            for t in range(tokens):
                to = int32s(out + t * out_stride + 64 * j, TILE_ROWS)
                to[:] = found[t] + (to if adding and PLANTED != "adding" else 0)

    return panel_sums


def clear() -> None:
    Unit.total = np.zeros((Unit.tokens, TILE_ROWS), np.int32)


def add_few(tile: int, depths: int, codes: int, stride: int) -> None:
    assert 1 <= depths <= amx.FEW_DEPTHS and Unit.tokens
    Unit.total = Unit.total + sums(tile, 64 * depths, codes, stride, Unit.tokens)


def store_few(out: int) -> None:
    stored = int32s(out, 3 * 256).reshape(3, 16, TILE_ROWS)
    stored[:] = 0
    stored[0, : Unit.tokens] = Unit.total


def add_chains(stored: int, tokens: int, out: int, out_stride: int) -> None:
    found = int32s(stored, 3 * 256).reshape(3, 16, TILE_ROWS).sum(0, dtype=np.int32)
    for t in range(tokens):
        int32s(out + t * out_stride, TILE_ROWS)[:] = found[t]


def packed(most: int) -> Any:
    def tile_sums(
        tile: int, units: int, tail: int, codes: int, stride: int, last: int, out: int, row: int
    ) -> None:
        columns = (units * 8 + tail) * 12
        room = np.zeros(columns * TILE_ROWS, np.uint8)
        unpack_tile(tile, units, tail, room.ctypes.data)
        found = sums(room.ctypes.data, columns, codes, stride, min(most, last + 1))
        for t, values in enumerate(found):
            int32s(out + t * row, TILE_ROWS)[:] = values

    return tile_sums


def emulate() -> None:
    """Put the emulated intrinsics in their places."""
    amx.unpack_tile = unpack_tile  # type: ignore[assignment]
    amx.bytes_panel, amx.add_panel = panel(False), panel(True)
    amx.panels = simd.by_panels(amx.bytes_panel, amx.PANEL_TILES, amx.PANEL_TOKENS)
    amx.configure_4, amx.configure_8, amx.configure_16 = map(configured, (4, 8, 16))
    amx.release = configured(0)
    amx.clear, amx.add_few, amx.store_few = clear, add_few, store_few
    amx.add_chains = add_chains
    for n in (1, 2, 3, 4, 8):
        setattr(simd, f"packed_{n}", packed(n))


def compare_ternary(width: int, tiles: int, tokens: int) -> None:
    """`ternary_sums` against NumPy."""
    rng = np.random.default_rng(width + tokens)
    values = rng.integers(-1, 2, (tiles * TILE_ROWS, width)).astype(np.int8)
    padded, size = ternary_layout.padded_width(width), ternary_layout.tile_bytes(width)
    units, tail = ternary_layout.units(width), ternary_layout.tail_lines(width)
    rows_packed, tiled = pack_ternary(values), np.zeros(tiles * size, np.uint8)
    scratch = np.zeros(32 * (max(padded, 4 * rows_packed.shape[1]) + 64) + 512, np.uint8)
    repack(rows_packed.ctypes.data, rows_packed.shape[1], len(values), units, tail,
           tiled.ctypes.data, scratch.ctypes.data)  # fmt: skip
    codes = np.zeros((tokens + 32, padded), np.int8)
    codes[:, :width] = rng.integers(-127, 128, (len(codes), width))
    out, room = np.full((len(codes), ACC_STRIDE // 4), 7, np.int32), np.zeros(LEAST_ROOM, np.uint8)
    rows.ternary_sums(tokens, tiled.ctypes.data, tiles, size, units, tail, padded,
                      codes.ctypes.data, padded, out.ctypes.data, room.ctypes.data)  # fmt: skip
    exact = codes[:tokens, :width].astype(np.int32) @ (values.T.astype(np.int32) + 1)
    assert np.array_equal(exact, out[:tokens, : len(values)]), (width, tiles, tokens)
    assert Unit.tokens == 0, "not released"


def compare_vocabulary(width: int, tokens: int) -> None:
    """`vocab_sums` of 8-bit rows for many tokens against NumPy."""
    rng = np.random.default_rng(width)
    values = rng.integers(-127, 128, (3 * TILE_ROWS, width)).astype(np.int8)
    packed = np.zeros((len(values), vocab_layout.row_bytes(width, 8)), np.uint8)
    vocab_layout.pack(values, 8, packed)
    codes = np.zeros((tokens + 32, vocab_layout.padded_width(width, 8)), np.int8)
    codes[:, :width] = rng.integers(-127, 128, (len(codes), width))
    out = np.zeros((len(codes), ACC_STRIDE // 4), np.int32)
    rows.vocab_sums(INT8, tokens, packed.ctypes.data, 3, TILE_ROWS * packed.shape[1], 0,
                    codes.ctypes.data, codes.shape[1], out.ctypes.data)  # fmt: skip
    exact = codes[:tokens, :width].astype(np.int32) @ (values.T.astype(np.int32) + 128)
    assert np.array_equal(exact, out[:tokens, : len(values)]), (width, tokens)
    assert Unit.tokens == 0, "not released"


if __name__ == "__main__":
    emulate()
    compared = 0
    for width in (60, 300, 440, 820):  # tails alone, units and tails, long rows
        for tiles, tokens in ((1, 2), (4, 3), (3, 5), (4, 9), (2, 16), (3, 17), (4, 50)):
            compare_ternary(width, tiles, tokens)
            compared += 1
    for width, tokens in ((64, 5), (70, 33)):
        compare_vocabulary(width, tokens)
        compared += 1
    print(compared)
