"""Integer products: every tile of this machine's path and of the plain one, at the extremes."""

from __future__ import annotations

import numpy as np
import pytest

from bitskip_cpu.compiling import KERNELS
from bitskip_cpu.isa import PATH
from bitskip_cpu.kernels.products import rows as linear
from bitskip_cpu.kernels.products import ternary_layout as tiles
from bitskip_cpu.workspace import LEAST_ROOM
from bitskip_ref.packing import pack_ternary
from tests.kernels.calling import at, call, same_bits


def weights(kind: str, rows: int, width: int) -> np.ndarray:
    if kind == "random":
        return np.random.default_rng(0).integers(-1, 2, (rows, width)).astype(np.int8)
    return np.full((rows, width), {"plus": 1, "minus": -1, "zero": 0}[kind], np.int8)


def activations(kind: str, count: int, width: int) -> np.ndarray:
    if kind == "random":
        return np.random.default_rng(1).integers(-127, 128, (count, width)).astype(np.int8)
    return np.full((count, width), 127 if kind == "plus" else -127, np.int8)


@pytest.mark.parametrize("width", [1, 48, 60, 61, 96, 192, 257, 2048])
@pytest.mark.parametrize("w", ["random", "plus", "minus", "zero"])
@pytest.mark.parametrize("x", ["random", "plus", "minus"])
def test_ternary_tiles(width: int, w: str, x: str) -> None:
    rows = 2 * tiles.TILE_ROWS - 3
    values = weights(w, rows, width)
    padded, size = tiles.padded_width(width), tiles.tile_bytes(width)
    units, tail = tiles.units(width), tiles.tail_lines(width)
    packed, tiled = pack_ternary(values), np.full(2 * size + 64, 77, np.uint8)
    scratch = np.zeros(32 * (max(padded, 4 * packed.shape[1]) + 64) + 512, np.uint8)
    KERNELS.repack(at(packed), packed.shape[1], rows, units, tail, at(tiled), at(scratch))
    assert (tiled[2 * size :] == 77).all()
    exact_rows = np.zeros((2 * tiles.TILE_ROWS, width), np.int32)
    exact_rows[:rows] = values
    unpacked = np.zeros((2, 16 * padded), np.uint8)
    for i in range(2):
        call(linear.unpack_tile, tiled[i * size :], units, tail, unpacked[i])
        codes_of = unpacked[i].reshape(-1, 16, 4).transpose(1, 0, 2).reshape(16, padded)
        assert np.array_equal(codes_of[:, :width], exact_rows[16 * i : 16 * i + 16] + 1)
        assert (codes_of[:, width:] <= 2).all()
    room = max(8, linear.BLOCK_TOKENS)
    for kernel, tokens in (
        ("packed_1", 1), ("packed_2", 2), ("packed_3", 3), ("packed_4", 4), ("packed_4", 3),
        ("packed_8", 8), ("packed_8", 5), ("bytes_block", linear.BLOCK_TOKENS), ("bytes_block", 1),
    ):  # fmt: skip
        codes = np.zeros((room, padded), np.int8)
        codes[:, :width] = activations(x, room, width)
        exact = codes[:, :width].astype(np.int32) @ exact_rows.T
        exact += codes.sum(axis=1, keepdims=True, dtype=np.int32)  # weights count as w + 1
        out = np.zeros((room, 64), np.int32)
        sums = out.reshape(-1)
        if kernel == "bytes_block":
            call(linear.begin_blocks)
            for i in range(0, 2, linear.BLOCK_TILES):
                call(linear.bytes_block, unpacked[i:], 16 * padded, 1 - i, padded // 4, codes,
                     padded, tokens - 1, sums[16 * i :], 256)  # fmt: skip
            call(linear.end_blocks)
        else:
            for i in range(2):
                call(getattr(linear, kernel), tiled[i * size :], units, tail, codes, padded,
                     tokens - 1, sums[16 * i :], 256)  # fmt: skip
        assert same_bits(exact[:tokens], np.ascontiguousarray(out[:tokens, :32])), kernel


@pytest.mark.skipif(PATH != "amx512", reason="needs a matrix unit")
@pytest.mark.parametrize("width", [1, 60, 96, 192, 252, 300, 384, 440, 2048])
@pytest.mark.parametrize("tokens", [1, 4, 5, 8, 9, 16, 17, 33, 64, 128])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_packed_tiles_in_the_matrix_unit(width: int, tokens: int, count: int) -> None:
    values, padded = weights("random", count * tiles.TILE_ROWS, width), tiles.padded_width(width)
    units, tail, size = tiles.units(width), tiles.tail_lines(width), tiles.tile_bytes(width)
    packed, tiled = pack_ternary(values), np.zeros(count * size, np.uint8)
    scratch = np.zeros(2 * 16 * max(padded, 4 * packed.shape[1]) + 512, np.uint8)
    KERNELS.repack(at(packed), packed.shape[1], len(values), units, tail, at(tiled), at(scratch))
    behind = tokens + 32  # may be read and written
    codes = np.zeros((behind, padded), np.int8)
    codes[:, :width] = activations("random", behind, width)
    out, room = np.full((behind, 64), 7, np.int32), np.full(LEAST_ROOM + 64, 99, np.uint8)
    shape = tokens, tiled, count, size, units, tail
    if tokens <= linear.UNPACK_ABOVE:
        call(linear.few_block, *shape, codes, padded, out, 256, room)
    else:
        call(linear.many_block, *shape, padded, codes, padded, out, 256, room)
    exact = codes[:, :width].astype(np.int32) @ (values.T.astype(np.int32) + 1)
    assert same_bits(exact[:tokens], np.ascontiguousarray(out[:tokens, : len(values)]))
    assert (room[LEAST_ROOM:] == 99).all()
