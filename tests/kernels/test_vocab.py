"""Rows of the vocabulary of 8, 6 and 4 bits: packing and products, at the extremes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bitskip_cpu.kernels.contenders import largest_of
from bitskip_cpu.kernels.layout import ACC_STRIDE, INT4, INT6, INT8, LANES
from bitskip_cpu.kernels.products import plain, rows, vocab_layout
from bitskip_cpu.kernels.products.ternary_layout import TILE_ROWS, padded_rows
from tests.kernels.calling import at, call, same_bits

KINDS = {4: INT4, 6: INT6, 8: INT8}


@pytest.mark.parametrize("bits", KINDS)
@pytest.mark.parametrize("width", [1, 15, 16, 48, 192, 2048])
@pytest.mark.parametrize("kind", ["random", "largest", "smallest", "opposite", "zero"])
@pytest.mark.parametrize("path", [rows.path, plain], ids=["of this machine", "plain"])
def test_products(path: Any, bits: int, width: int, kind: str) -> None:
    if path is plain and bits == 8 and not vocab_layout.OFFSET[8]:
        pytest.skip("plain loops take unsigned bytes")
    rng, top = np.random.default_rng(0), 2 ** (bits - 1) - 1
    codes_of_rows = rng.integers(-top, top + 1, (TILE_ROWS + 3, width)).astype(np.int8)
    codes = np.zeros((64, vocab_layout.padded_width(width, bits)), np.int8)
    codes[:, :width] = rng.integers(-127, 128, (len(codes), width))
    if kind != "random":
        codes_of_rows[:], codes[:, :width] = {
            "largest": (top, 127), "smallest": (-top, -127), "opposite": (-top, 127),
            "zero": (0, 127),
        }[kind]  # fmt: skip
    row_bytes, padded = vocab_layout.row_bytes(width, bits), padded_rows(len(codes_of_rows))
    packed = np.zeros((padded, row_bytes), np.uint8)
    vocab_layout.pack(codes_of_rows, bits, packed)
    exact = codes[:, :width].astype(np.int32) @ codes_of_rows.T.astype(np.int32)
    exact += vocab_layout.OFFSET[bits] * codes.sum(axis=1, keepdims=True, dtype=np.int32)
    units = -(-width // vocab_layout.VOCAB_COLUMNS)
    for tokens in (1, 2, 3, 4, 5, 6, 9, 32):
        out = np.zeros((len(codes), ACC_STRIDE // 4), np.int32)
        call(path.vocab_sums, KINDS[bits], tokens, packed, padded // TILE_ROWS,
             TILE_ROWS * row_bytes, units, codes, codes.strides[0], out)  # fmt: skip
        found = np.ascontiguousarray(out[:tokens, : len(codes_of_rows)])
        assert same_bits(exact[:tokens], found), tokens


@pytest.mark.parametrize("bits", KINDS)
@pytest.mark.parametrize("width", [1, 48, 2048])
@pytest.mark.parametrize(("tiles", "others"), [(1, 0), (2, 1), (4, 4)])
def test_tiles_of_two_places(bits: int, width: int, tiles: int, others: int) -> None:
    """Those that one token reads in turns, `others` of them at the second place."""
    rng, top = np.random.default_rng(0), 2 ** (bits - 1) - 1
    count = (tiles + others) * TILE_ROWS
    codes_of_rows = rng.integers(-top, top + 1, (count, width)).astype(np.int8)
    codes = np.zeros(vocab_layout.padded_width(width, bits) + 64, np.int8)
    codes[:width] = rng.integers(-127, 128, width)
    row_bytes, units = vocab_layout.row_bytes(width, bits), -(-width // vocab_layout.VOCAB_COLUMNS)
    packed = np.zeros((count, row_bytes), np.uint8)
    vocab_layout.pack(codes_of_rows, bits, packed)
    exact = codes_of_rows.astype(np.int32) @ codes[:width].astype(np.int32)
    exact += vocab_layout.OFFSET[bits] * codes.sum(dtype=np.int32)
    first, second = tiles * TILE_ROWS, others * TILE_ROWS
    out = np.full((3, ACC_STRIDE // 4), 7, np.int32)
    call(rows.vocab_sums_of_halves, KINDS[bits], tiles, packed, others,
         at(packed) + first * row_bytes, TILE_ROWS * row_bytes, units, codes, out)  # fmt: skip
    assert same_bits(exact[:first], out[0, :first])
    assert same_bits(exact[first:], out[1, :second])
    assert (out[0, first:] == 7).all() and (out[1:, second:] == 7).all()


@pytest.mark.parametrize("n", [1, 15, 16, 17, 33, 64])
def test_the_largest_of_a_band(n: int) -> None:
    room = np.zeros(LANES, np.float32)
    for place in range(n):
        x = np.arange(-n, 0, dtype=np.float32)
        x[place] = 3
        assert call(largest_of, x, n, room) == 3
