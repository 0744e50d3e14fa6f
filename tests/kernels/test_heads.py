"""Heads of 8, 6 and 4 bits: packing and products, at the extremes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bitskip_cpu.kernels.products import rows as linear
from bitskip_cpu.kernels.products import vocab_layout as heads
from bitskip_cpu.kernels.products import vocab_plain as heads_plain
from bitskip_cpu.kernels.products.ternary_layout import TILE_ROWS, padded_rows
from tests.kernels.calling import call, same_bits


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("width", [1, 15, 16, 48, 192, 2048])
@pytest.mark.parametrize("kind", ["random", "largest", "smallest", "opposite", "zero"])
def test_products(bits: int, width: int, kind: str) -> None:
    rng, top = np.random.default_rng(0), 2 ** (bits - 1) - 1
    rows = rng.integers(-top, top + 1, (TILE_ROWS + 3, width)).astype(np.int8)
    codes = np.zeros((4, heads.padded_width(width, bits)), np.int8)
    codes[:, :width] = rng.integers(-127, 128, (4, width))
    if kind != "random":
        rows[:], codes[:, :width] = {
            "largest": (top, 127), "smallest": (-top, -127), "opposite": (-top, 127),
            "zero": (0, 127),
        }[kind]  # fmt: skip
    packed = np.zeros((padded_rows(len(rows)), heads.row_bytes(width, bits)), np.uint8)
    heads.pack(rows, bits, packed)
    exact = codes[:, :width].astype(np.int32) @ rows.T.astype(np.int32)
    exact += heads.OFFSET[bits] * codes.sum(axis=1, keepdims=True, dtype=np.int32)
    modules = [linear, heads_plain] if bits < 8 or heads.OFFSET[8] else [linear]
    for module, (tokens, present) in itertools.product(modules, ((1, 1), (4, 4), (4, 3))):
        out = np.zeros((4, 2 * TILE_ROWS), np.int32)
        for i in range(2):
            kernel, groups = getattr(module, f"int{bits}_{tokens}"), codes.shape[1] // 16
            tile, to = packed[TILE_ROWS * i :], out.reshape(-1)[TILE_ROWS * i :]
            last = present - 1
            call(kernel, tile, groups, codes, codes.strides[0], last, to, out.strides[0])
        found = np.ascontiguousarray(out[:present, : len(rows)])
        assert same_bits(exact[:present], found)


@pytest.mark.skipif(linear.BYTES_ABOVE == linear.NEVER, reason="no kernel for unpacked bytes")
@pytest.mark.parametrize("width", [1, 64, 192, 2048])
@pytest.mark.parametrize("tokens", [1, linear.BLOCK_TOKENS])
@pytest.mark.parametrize("kind", ["random", "largest", "smallest"])
def test_many_tokens(width: int, tokens: int, kind: str) -> None:
    """Tiles of 8 bits are what the kernels of unpacked ternary tiles take."""
    rng, columns = np.random.default_rng(0), heads.padded_width(width, 8)
    rows = rng.integers(-127, 128, (2 * TILE_ROWS, width)).astype(np.int8)
    codes = np.zeros((32, columns), np.int8)
    codes[:, :width] = rng.integers(-127, 128, (32, width))
    if kind != "random":
        rows[:], codes[:, :width] = (127, 127) if kind == "largest" else (-127, 127)
    packed = np.zeros((len(rows), heads.row_bytes(width, 8)), np.uint8)
    heads.pack(rows, 8, packed)
    exact = codes.astype(np.int32) @ np.pad(rows, ((0, 0), (0, columns - width))).T.astype(np.int32)
    exact += heads.OFFSET[8] * codes.sum(axis=1, keepdims=True, dtype=np.int32)
    out = np.zeros((32, 2 * TILE_ROWS), np.int32)
    call(linear.begin_blocks)
    for i in range(0, 2, linear.BLOCK_TILES):
        tile, to = packed[TILE_ROWS * i :], out.reshape(-1)[TILE_ROWS * i :]
        call(linear.bytes_block, tile, TILE_ROWS * columns, 1 - i, columns // 4, codes, columns,
             tokens - 1, to, out.strides[0])  # fmt: skip
    call(linear.end_blocks)
    assert same_bits(exact[:tokens], np.ascontiguousarray(out[:tokens]))
