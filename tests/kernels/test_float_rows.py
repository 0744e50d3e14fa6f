"""Rows of floats times many tokens: the bits of SPEC 2.2's tree, on the path of this process."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from bitskip_cpu.kernels.layout import WIDENED, float_room
from bitskip_cpu.kernels.products import plain, rows
from bitskip_ref.arithmetic.sums import feature_sum
from tests.kernels.calling import at, call, compiled, same_bits

f32 = np.float32
ROWS = 37  # blocks, and rows that are not one
# The first two are no whole registers, the third too few of 16 floats; then groups of 4 to 8
# leaves. Of 2,064, more levels wait than a group's code knows.
WIDTHS = [1, 100, 64, 80, 112, 128, 144, 176, 240, 576, 688, 1024, 1536, 2064]


def products(path: ModuleType, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """x [T, n] times w [ROWS, n] by the path's kernel; what it must not touch is looked at."""
    (tokens, n), count = x.shape, len(w)
    ordered, out = np.zeros_like(x), np.full((tokens, count + 3), 7, f32)
    for t in range(tokens):
        compiled(path.order)(at(x) + t * x.strides[0], n, at(ordered) + t * x.strides[0])
    room = np.full(float_room(n) // 4 - WIDENED * n, np.nan, f32)
    scratch = np.full(4096, 7, f32)
    call(path.float_sums, tokens, x, x.strides[0], ordered, ordered.strides[0], w, w.strides[0],
         count, n, out, out.strides[0], room, scratch)  # fmt: skip
    assert (out[:, count:] == 7).all()
    return np.ascontiguousarray(out[:, :count])


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("path", [rows.path, plain], ids=["of this machine", "plain"])
def test_products(path: ModuleType, n: int) -> None:
    rng = np.random.default_rng(n)
    w = (rng.standard_normal((ROWS, n)) * 2.0 ** rng.integers(-20, 20, (ROWS, n))).astype(f32)
    w[3], w[20] = abs(w[3]), 0.0
    for tokens in (1, 3, 8, 21):
        x = (rng.standard_normal((tokens, n)) * 2.0 ** rng.integers(-20, 20, n)).astype(f32)
        x[0] = -0.0  # padding makes a sum of them +0
        exact = feature_sum(x[:, None] * w)
        assert same_bits(exact, products(path, x, w)), tokens
        if n > 3 and tokens > 1:  # another order would be seen
            assert not same_bits(exact, np.add.accumulate(x[:, None] * w, axis=2)[..., -1])


def test_numbers_that_are_not_finite() -> None:
    x, w = np.ones((2, 144), f32), np.ones((8, 144), f32)
    x[1, 143], w[2, 7], w[3, 8], w[4, 9], w[4, 10] = np.nan, np.inf, -np.inf, np.inf, -np.inf
    found = products(rows.path, x, w)
    assert found[0, 2] == np.inf and found[0, 3] == -np.inf and np.isnan(found[0, 4])
    assert np.isnan(found[1]).all() and found[0, 0] == 144
