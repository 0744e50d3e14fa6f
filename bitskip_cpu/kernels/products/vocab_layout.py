"""How rows of the vocabulary of 8, 6 or 4 bits lie in memory while a model runs (SPEC 4.4).

Tiles of 16 rows and lines of 64 bytes as in `ternary_layout`; a unit is four planes of 4 columns.
Codes are stored as w + OFFSET[bits].

    4 bits    two lines: planes 0 and 1 in the low and high half of the first's bytes, 2 and 3
    6 bits    three lines: planes 0, 1, 2 in the low 6 bits; plane 3 in the upper 2 bits of each,
              its lowest bits first
    8 bits    a line for each plane; rows are padded to 64 columns, what a matrix unit takes
"""

from __future__ import annotations

import numpy as np

from bitskip_cpu.isa import PATH
from bitskip_cpu.kernels.products.ternary_layout import COLUMNS, LINE, TILE_ROWS

VOCAB_COLUMNS = 16  # of a unit
VOCAB_LINES = {4: 2, 6: 3, 8: 4}  # of a unit
OFFSET = {4: 8, 6: 32, 8: 0 if PATH.signed_bytes else 128}


ROUND_UP = np.float32(1 + 2.0**-20)  # makes an f32 product of two such norms no smaller than theirs


def padded_width(width: int, bits: int) -> int:
    """Columns of a row with its padding."""
    columns = 64 if bits == 8 else VOCAB_COLUMNS
    return -(-width // columns) * columns


def row_bytes(width: int, bits: int) -> int:
    """Bytes of a tile of rows of `width` codes, over its rows."""
    return padded_width(width, bits) // VOCAB_COLUMNS * VOCAB_LINES[bits] * LINE // TILE_ROWS


def pack_upper(codes: np.ndarray, out: np.ndarray, norms: np.ndarray) -> None:
    """The upper 4 of 8 bits as rows of 4, and the norms of what is left (SPEC 9.6).

    int8 [V, D] -> uint8 [padded_rows(V), row_bytes(D, 4)], f32 [V].
    """
    pack(codes >> 4, 4, out)
    left = ((codes & 15).view(np.uint8) * np.uint8(2)).view(np.int8) - np.int8(15)
    squares = np.einsum("ij,ij->i", left, left, dtype=np.float64)
    norms[:] = np.sqrt(squares).astype(np.float32) * ROUND_UP


def pack(codes: np.ndarray, bits: int, out: np.ndarray) -> None:
    """int8 [V, D] -> uint8 [padded_rows(V), row_bytes(D)]; missing codes are 0."""
    columns = padded_width(codes.shape[1], bits)
    padded = np.zeros((len(out), columns), np.int8)
    padded[: len(codes), : codes.shape[1]] = codes
    shifted = padded.view(np.uint8) + np.uint8(OFFSET[bits])
    # Four columns are a word: [tile, row, word] -> [tile, word, row]
    words = shifted.view(np.int32).reshape(-1, TILE_ROWS, columns // COLUMNS).transpose(0, 2, 1)
    fours = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        out[:] = fours.reshape(out.shape)
        return
    a, b, c, d = (fours[:, p::4] for p in range(4))
    if bits == 4:
        lines = [a | b << 4, c | d << 4]
    else:
        lines = [a | (d & 3) << 6, b | (d >> 2 & 3) << 6, c | (d >> 4) << 6]
    out[:] = np.stack(lines, 2).reshape(out.shape)
