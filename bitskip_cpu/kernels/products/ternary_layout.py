"""How ternary weights lie in memory while a model runs, and the integers that describe it.

A tile is 16 rows of a product. In it, one *line* of 64 bytes concerns 4 columns of each row and
plane: byte 4 r + c belongs to row r, column c. A line multiplied by 4 activation codes, repeated
16 times, adds to the 16 rows' sums lane by lane, so that no sum is ever taken across lanes.

    two bits    a line holds 4 planes of 4 columns: bits 2p, 2p + 1 of its bytes are plane p
    by bytes    a line's low 5 bits hold 3 planes as one number d0 + 3 d1 + 9 d2; the upper 3 bits
                of 5 lines hold the numbers of 3 lines more, so that 5 lines are worth 8
    by words    a line is 32 words, of 2 columns c, c + 1 each; two numbers of 5 bits hold their
                3 planes: e of plane 0, f of plane 1, g of plane 2, as e[c] + 3 e[c + 1] + 9 g[c]
                and f[c] + 3 f[c + 1] + 9 g[c + 1]. A word has room for three numbers, so that
                2 lines are worth 3

Which of them is the path's `dense`: a register of 64 bytes or 32 words is the table that digits are
looked up in. Codes are w + 1: 0, 1, 2. Lines are read a *unit* at a time; what is left at a row's
end is its *tail* of single lines, dense ones with unused upper bits. `bitskip_cpu.kernels` has a
drawing.
"""

from __future__ import annotations

from bitskip_cpu.isa import PATH

TILE_ROWS = 16  # of a tile
LINE = 64  # bytes
COLUMNS = 4  # of a line and plane
BY_BYTES, BY_WORDS = PATH.dense == 8, PATH.dense == 16
PLANES = 3 if PATH.dense else 4  # of a line
UNIT_LINES, UNIT_WORTH = {0: (4, 4), 8: (5, 8), 16: (2, 3)}[PATH.dense]
"""Lines that are stored for a unit, and lines that it is worth."""
LINE_COLUMNS = PLANES * COLUMNS
UNIT_COLUMNS = UNIT_WORTH * LINE_COLUMNS


def padded_rows(rows: int) -> int:
    """Rows with those that fill up the last tile."""
    return -(-rows // TILE_ROWS) * TILE_ROWS


def units(width: int) -> int:
    """Whole units of a row of `width` weights."""
    left = width % UNIT_COLUMNS
    # A rest worth more than UNIT_LINES lines is cheaper as a unit.
    return width // UNIT_COLUMNS + (left > UNIT_LINES * LINE_COLUMNS)


def tail_lines(width: int) -> int:
    """Lines of the tail of a row of `width` weights."""
    left = max(0, width - units(width) * UNIT_COLUMNS)
    return -(-left // LINE_COLUMNS)


def padded_width(width: int) -> int:
    """Columns of a row with its padding, once unpacked: a multiple of the path's `columns`."""
    columns = units(width) * UNIT_COLUMNS + tail_lines(width) * LINE_COLUMNS
    return -(-columns // PATH.columns) * PATH.columns


def tile_bytes(width: int) -> int:
    """Bytes of a tile of rows of `width` weights."""
    return (units(width) * UNIT_LINES + tail_lines(width)) * LINE
