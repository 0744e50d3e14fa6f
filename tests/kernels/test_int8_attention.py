"""Attention over an int8 cache against the reference (SPEC 6.8)."""

from __future__ import annotations

import numpy as np
import pytest

from bitskip_cpu.cache import padded_values
from bitskip_cpu.kernels.attention import int8 as kernels
from bitskip_cpu.kernels.layout import LANES, int8_scratch
from bitskip_ref.arithmetic.attention import int8_attention
from bitskip_ref.arithmetic.quant import quantize_activations
from tests.kernels.calling import call, same_bits

f32 = np.float32


class Head:
    """Keys and values f32 [S, E] of one head in pages that lie anywhere, full of other things."""

    def __init__(self, keys: np.ndarray, values: np.ndarray) -> None:
        size, self.dim = keys.shape
        self.padded, self.width = -(-self.dim // 4) * 4, padded_values(self.dim)
        self.values = LANES * self.padded + 8 * LANES
        count = -(-size // LANES)
        rng = np.random.default_rng(size)
        part = self.values + LANES * self.width
        self.pages = rng.integers(0, 256, (3 * count, part), np.uint8)
        order = rng.permutation(3 * count)[:count]
        self.table = self.pages.ctypes.data + self.pages.strides[0] * order
        scratch = np.zeros(1024, np.uint8)
        for position, (key, value) in enumerate(zip(keys, values, strict=True)):
            page, lane = divmod(position, LANES)
            at = int(self.table[page])
            call(kernels.store_key_codes, key.copy(), at, self.dim, lane, scratch)
            call(kernels.store_value_codes, value.copy(), at + self.values, self.dim, self.width,
                 lane, scratch)  # fmt: skip

    def attend(self, q: np.ndarray, seen: int) -> np.ndarray:
        """q f32 [queries, E] -> the same."""
        size, found = int8_scratch(seen, self.dim, self.width), []
        for cold in (False, True):
            scratch, guard = np.full(size + 64, 0xAA, np.uint8), np.full(64, 0xAA, np.uint8)
            out = np.zeros(q.shape, f32)
            call(kernels.over_int8, len(q), q, self.table, 0, self.values, 0, self.dim, 0,
                 self.width, seen, cold, self.table, 2 * cold, 0, out, scratch)  # fmt: skip
            assert same_bits(guard, scratch[size:])
            found.append(out)
        assert same_bits(*found)
        return found[0]


def expected(q: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    held = *quantize_activations(keys[:, None], 8), *quantize_activations(values[:, None], 8)
    return int8_attention(q[None], *held).reshape(q.shape)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=f32)


@pytest.mark.parametrize("head_dim", [2, 6, 16, 26, 64, 80, 128, 256])
@pytest.mark.parametrize("seen", [1, 2, 15, 16, 17, 33, 63, 64, 65, 100, 129, 600])
def test_attend(head_dim: int, seen: int) -> None:
    keys, values = random(seen, head_dim, seed=1), random(seen, head_dim, seed=2)
    keys[0], values[0] = 1e4, 1e-7
    values[-1] *= 1e6
    head = Head(keys, values)
    for queries in (1, 2, 3, 4):
        q = random(queries, head_dim) * f32(0.3)
        assert same_bits(expected(q, keys, values), head.attend(q, seen))
    if seen > 1:  # a shorter past: later positions are there, and must not matter
        assert same_bits(expected(q, keys[:-1], values[:-1]), head.attend(q, seen - 1))


def test_zeros() -> None:
    """Equal scores, values of nothing, and both at once: no division by zero, no negative zero."""
    keys, values, q = random(20, 8), -random(20, 8), np.zeros((2, 8), f32)
    for k, v in ((keys, values * 0), (keys * 0, values), (keys * 0, values * 0)):
        out = Head(k, v).attend(q, 20)
        assert same_bits(expected(q, k, v), out)
        assert not np.signbit(out[out == 0]).any()


def test_the_largest_sums() -> None:
    """Every code at its largest, over more positions than int32 would hold without two parts."""
    seen, dim = 4000, 16
    keys, values, q = (np.full((n, dim), 1.0, f32) for n in (seen, seen, 4))
    for sign in (1, -1):
        head = Head(keys, values * sign)
        assert same_bits(expected(q, keys, values * sign), head.attend(q, seen))


def test_not_finite_numbers_stay_inside() -> None:
    """SPEC 4.2 says nothing of them; kernels must find their way all the same, and give none that
    look like numbers (SPEC 9.5)."""
    for at in range(3):
        given = random(40, 16), random(40, 16), random(2, 16)
        given[at][1, 5] = (np.nan, np.inf, -np.inf)[at]
        keys, values, q = given
        out = Head(keys, values).attend(q, 40)
        assert not np.isfinite(out[1]).any()
        assert np.isfinite(out[0]).all() == (at == 2)  # only of the query that is no number
    keys[30] = values[30] = np.nan  # behind what is seen
    q[1, 5] = 0
    assert np.isfinite(Head(keys, values).attend(q, 30)).all()
