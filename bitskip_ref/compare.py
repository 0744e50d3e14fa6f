"""Comparing two engines bit for bit: what a difference report says."""

from __future__ import annotations

import numpy as np


def difference(name: str, expected: np.ndarray, actual: np.ndarray) -> str | None:
    """None if shape, dtype and every bit agree; else one line naming how and where they do not.

    For floats the report counts differing elements and shows the first and the worst, with bits.
    """
    expected, actual = np.asarray(expected), np.asarray(actual)
    if expected.shape != actual.shape:
        return f"{name}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    if expected.dtype != actual.dtype:
        return f"{name}: dtype {actual.dtype}, expected {expected.dtype}"
    kind = np.dtype(f"u{expected.dtype.itemsize}")
    bits = [np.ascontiguousarray(x).view(kind).reshape(-1) for x in (expected, actual)]
    places = np.flatnonzero(bits[0] != bits[1])
    if not places.size:
        return None
    flat = [np.ascontiguousarray(x).reshape(-1) for x in (expected, actual)]
    gaps = np.abs(flat[0][places].astype(np.float64) - flat[1][places].astype(np.float64))
    worst = places[int(np.argmax(np.nan_to_num(gaps, nan=np.inf, posinf=np.inf)))]
    width = 2 + 2 * expected.dtype.itemsize

    def show(at: int) -> str:
        index = [int(n) for n in np.unravel_index(at, expected.shape)]
        values = " against ".join(
            f"{x[at]!s} ({b[at]:#0{width}x})" for x, b in zip(flat, bits, strict=True)
        )
        return f"{index}: {values}"

    return (
        f"{name}: {places.size} of {flat[0].size} values differ; "
        f"first {show(int(places[0]))}; worst {show(int(worst))}"
    )
