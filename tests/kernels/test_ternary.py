"""Integer products of ternary tiles: every kernel of this machine's path, at the extremes."""

from __future__ import annotations

import numpy as np
import pytest

from bitskip_cpu.compiling import KERNELS
from bitskip_cpu.kernels.layout import ACC_STRIDE
from bitskip_cpu.kernels.products import rows, ternary_layout
from bitskip_cpu.kernels.products.ternary_layout import TILE_ROWS
from bitskip_cpu.workspace import LEAST_ROOM
from bitskip_ref.packing import pack_ternary
from tests.kernels.calling import at, call, same_bits

TOKENS = {  # by the kernel that serves them without a matrix unit
    "packed_1": 1, "packed_2": 2, "packed_3": 3, "packed_4": 4, "packed_8": 8,
    "packed_8, 5 tokens": 5, "packed_8 and packed_1": 9, "packed_8 twice": 16,
    "bytes_panel": 17, "bytes_panel, whole": 24, "many": 33, "a chunk": 128,
}  # fmt: skip


def weights(kind: str, count: int, width: int) -> np.ndarray:
    if kind == "random":
        return np.random.default_rng(0).integers(-1, 2, (count, width)).astype(np.int8)
    return np.full((count, width), {"plus": 1, "minus": -1, "zero": 0}[kind], np.int8)


def activations(kind: str, count: int, width: int) -> np.ndarray:
    if kind == "random":
        return np.random.default_rng(1).integers(-127, 128, (count, width)).astype(np.int8)
    return np.full((count, width), 127 if kind == "plus" else -127, np.int8)


def tiled(values: np.ndarray) -> np.ndarray:
    """Weights [rows, width] as tiles, which `repack` makes without writing behind them."""
    width, packed = values.shape[1], pack_ternary(values)
    size = -(-len(values) // TILE_ROWS) * ternary_layout.tile_bytes(width)
    found = np.full(size + 64, 77, np.uint8)
    widest = max(ternary_layout.padded_width(width), 4 * packed.shape[1])
    scratch = np.zeros(32 * (widest + 64) + 512, np.uint8)
    KERNELS.repack(
        at(packed), packed.shape[1], len(values), ternary_layout.units(width),
        ternary_layout.tail_lines(width), at(found), at(scratch),
    )  # fmt: skip
    assert (found[size:] == 77).all()
    return found


def check(values: np.ndarray, x: str, tokens: int) -> None:
    """`ternary_sums` of weights [rows, width] against NumPy's."""
    width, tiles = values.shape[1], -(-len(values) // TILE_ROWS)
    padded, behind = ternary_layout.padded_width(width), tokens + 32  # may be read and written
    exact = np.zeros((tiles * TILE_ROWS, width), np.int32)
    exact[: len(values)] = values
    codes = np.zeros((behind, padded), np.int8)
    codes[:, :width] = activations(x, behind, width)
    size = max(LEAST_ROOM, tiles * TILE_ROWS * padded)
    out, room = np.full((behind, ACC_STRIDE // 4), 7, np.int32), np.full(size + 64, 99, np.uint8)
    call(rows.ternary_sums, tokens, tiled(values), tiles, ternary_layout.tile_bytes(width),
         ternary_layout.units(width), ternary_layout.tail_lines(width), padded, codes, padded, out,
         room)  # fmt: skip
    expected = codes[:, :width].astype(np.int32) @ (exact.T + 1)  # weights count as w + 1
    assert same_bits(expected[:tokens], np.ascontiguousarray(out[:tokens, : len(exact)]))
    assert (room[size:] == 99).all()


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("width", [1, 25, 36, 48, 60, 61, 96, 192, 257, 2048])
def test_kernels_at_the_extremes(width: int, tokens: int) -> None:
    for w in ("random", "plus", "minus", "zero"):
        for x in ("random", "plus", "minus"):
            check(weights(w, 2 * TILE_ROWS - 3, width), x, tokens)


@pytest.mark.parametrize("width", [1, 60, 96, 192, 252, 300, 384, 440, 2048])
@pytest.mark.parametrize("tiles", [1, 3, 4])
def test_any_number_of_tiles_and_tokens(width: int, tiles: int) -> None:
    for tokens in (1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64, 128):
        check(weights("random", tiles * TILE_ROWS, width), "random", tokens)


@pytest.mark.parametrize("width", [1, 60, 96, 257, 440, 2048])
@pytest.mark.parametrize(("tiles", "others"), [(1, 0), (1, 1), (2, 1), (4, 4)])
def test_tiles_of_two_places(width: int, tiles: int, others: int) -> None:
    """Those that one token reads in turns, `others` of them at the second place."""
    size, behind = ternary_layout.tile_bytes(width), ternary_layout.padded_width(width)
    codes = np.zeros((33, behind), np.int8)
    codes[:, :width] = activations("random", len(codes), width)
    for w in ("random", "plus", "minus"):
        values = weights(w, (tiles + others) * TILE_ROWS, width)
        packed, out = tiled(values), np.full((3, ACC_STRIDE // 4), 7, np.int32)
        call(rows.ternary_sums_of_halves, tiles, packed, others, at(packed) + tiles * size, size,
             ternary_layout.units(width), ternary_layout.tail_lines(width), codes,
             out)  # fmt: skip
        exact = (values.astype(np.int32) + 1) @ codes[0, :width].astype(np.int32)
        first, second = tiles * TILE_ROWS, others * TILE_ROWS
        assert same_bits(exact[:first], out[0, :first])
        assert same_bits(exact[first:], out[1, :second])
        assert (out[0, first:] == 7).all() and (out[1:, second:] == 7).all()


@pytest.mark.parametrize("width", [1, 60, 192, 257])
def test_unpacked_tiles(width: int) -> None:
    values, padded = weights("random", TILE_ROWS, width), ternary_layout.padded_width(width)
    units, tail = ternary_layout.units(width), ternary_layout.tail_lines(width)
    out = np.zeros(TILE_ROWS * padded, np.uint8)
    call(rows.path.unpack_tile, tiled(values), units, tail, out)
    found = out.reshape(-1, TILE_ROWS, 4).transpose(1, 0, 2).reshape(TILE_ROWS, padded)
    assert np.array_equal(found[:, :width], values + 1)
    assert (found[:, width:] <= 2).all()
