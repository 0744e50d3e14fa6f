"""How a head of 6 or 4 bits lies in memory while a model runs (SPEC 4.4).

Tiles of 16 rows and lines of 64 bytes as in `tiles`; 16 columns of a tile are a group of four
planes of 4 columns. Codes are stored as w + 2^(bits - 1), at least 1.

    4 bits    two lines: planes 0 and 1 in the low and high half of the first's bytes, 2 and 3
    6 bits    three lines: planes 0, 1, 2 in the low 6 bits; plane 3 in the upper 2 bits of each,
              its lowest bits first
"""

from __future__ import annotations

import numpy as np

from bitskip_cpu.aligned import aligned
from bitskip_cpu.kernels.tiles import COLUMNS, LINE, TILE_ROWS

GROUP = 16  # columns
LINES = {4: 2, 6: 3}  # of a group


def row_bytes(width: int, bits: int) -> int:
    """Bytes of a tile of rows of that many codes, over its rows."""
    return -(-width // GROUP) * LINES[bits] * LINE // TILE_ROWS


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """int8 [V, D] -> tiles, uint8 [ceil(V / 16) * 16, row_bytes]; missing codes are 0."""
    vocabulary, width = codes.shape
    groups, size = -(-width // GROUP), row_bytes(width, bits)
    result = aligned((-(-vocabulary // TILE_ROWS) * TILE_ROWS, size), np.uint8, zeros=False)
    for first in range(0, len(result), 1024):  # bounded scratch
        part = codes[first : first + 1024]
        count = min(1024, len(result) - first)
        padded = np.zeros((count, groups * GROUP), np.int8)
        padded[: len(part), :width] = part
        shifted = (padded + np.int8(2 ** (bits - 1))).view(np.uint8)
        # [tile, row, group, plane, column] -> [tile, group, plane, row, column]
        planes = shifted.reshape(-1, TILE_ROWS, groups, 4, COLUMNS).transpose(0, 2, 3, 1, 4)
        a, b, c, d = (planes[:, :, p] for p in range(4))
        if bits == 4:
            lines = [a | b << 4, c | d << 4]
        else:
            lines = [a | (d & 3) << 6, b | (d >> 2 & 3) << 6, c | (d >> 4) << 6]
        result[first : first + count] = np.stack(lines, 2).reshape(count, size)
    return result
