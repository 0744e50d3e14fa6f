"""How a product is cut into parts, which threads share: runs of rows, or two runs of each half."""

from __future__ import annotations

from bitskip_cpu.kernels.layout import BAND, BOUND, FLOAT32, FLOAT_ROWS, SETTLE, VOCAB
from bitskip_cpu.kernels.numba_inside.decorators import kernel
from bitskip_cpu.kernels.products.rows import IN_HALVES

PART_BYTES = 1 << 15  # of weights, about, in one part of a product


@kernel
def cost_of(s, first, last, row_bytes):
    """Bytes that a product reads, as `run_stage` counts them."""
    return (last - first) * row_bytes * ((s.tokens + 3) // 4)


@kernel
def rows_of_part(s, index, first, last, row_bytes):
    """How many rows of a product are a part: half a band of a block's long ones for one token.

    So threads end together; several tokens, and bounds of a vocabulary (SPEC 9.6), need bands.
    A part of two runs of rows has as many in each, of a block half as many.
    """
    runs = 2 if index < VOCAB and in_halves(s, index) else 1
    if s.tokens == 1 and index < VOCAB and row_bytes * BAND > 2 * PART_BYTES:
        return BAND // 2 // runs
    bands = max(1, PART_BYTES // (row_bytes * BAND), (last - first) // (BAND * 60_000))
    return bands * BAND // runs


@kernel
def in_halves(s, index):
    """Whether one token reads both halves of a product's rows in turns: only rows of integers."""
    if not IN_HALVES or s.tokens > 1 or index == SETTLE:
        return False
    if index < VOCAB:
        return s.linear_kind != FLOAT_ROWS
    return index == BOUND or s.vocab_kind < FLOAT32


@kernel
def rows_apart(s, index, first, last, part_rows):
    """How far the second of a part's two runs of rows is from the first; 0: it has but one."""
    if in_halves(s, index) and last - first > part_rows:
        return -(-(last - first) // (2 * part_rows)) * part_rows
    return 0


@kernel
def parts_of(first, last, part_rows, apart):
    """How many parts a product's rows are: as many as first runs."""
    return -(-(apart or last - first) // part_rows)
