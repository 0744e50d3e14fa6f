"""Quantizers, packing and the Hadamard transform against literals and laws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitskip_ref.arithmetic.hadamard import fwht, rotate, rotate_unpadded
from bitskip_ref.arithmetic.quant import (
    float_linear,
    int8_linear,
    quantize_activations,
    quantize_weights,
    ternary_linear,
)
from bitskip_ref.arithmetic.sums import feature_sum
from bitskip_ref.packing import IllegalCodeError, pack_ternary, packed_width, unpack_ternary

f32 = np.float32


def test_weights_by_hand() -> None:
    # mean |w| = 1, so the thresholds are +-0.5, and a tie gives 0.
    w = np.array([[0.5, -0.5, 0.75, -2.25], [0.0, 2.0, -1.5, 0.5]], f32)
    codes, alpha = quantize_weights(w)
    assert alpha == f32(1.0) and alpha.dtype == f32
    assert codes.tolist() == [[0, 0, 1, -1], [0, 1, -1, 0]]


def test_zero_weights() -> None:
    codes, alpha = quantize_weights(np.zeros((2, 3), f32))
    assert alpha == f32(1e-5) and not codes.any()


def test_activations_by_hand() -> None:
    x = np.array([[127.0, 0.5, 1.5, -2.5, -127.0], [0, 0, 0, 0, -0.0]], f32)
    codes, step = quantize_activations(x, 8)
    assert codes.tolist() == [[127, 0, 2, -2, -127], [0, 0, 0, 0, 0]]  # ties to even
    assert step[0, 0] == f32(1.0) and step[1, 0] == f32(1e-5) / f32(127)


def test_four_bit_codes() -> None:
    codes, step = quantize_activations(np.array([7.0, -7.0, 0.5, 3.4], f32), 4)
    assert codes.tolist() == [7, -7, 0, 3] and step.tolist() == [1.0]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=True), min_size=1, max_size=40
    ),
    st.sampled_from([4, 8]),
)
def test_activation_codes_stay_in_range(values: list[float], bits: int) -> None:
    x = np.array(values, f32)
    codes, step = quantize_activations(x, bits)
    assert np.abs(codes.astype(int)).max() <= 2 ** (bits - 1) - 1
    bound = step.astype(np.float64) * 0.5 * (1 + 1e-5)
    assert (np.abs(codes * step.astype(np.float64) - x) <= bound).all()


def test_ternary_linear_by_hand() -> None:
    x = np.array([[127.0, -64.0, 1.0]], f32)
    w = np.array([[1, -1, 0], [0, 1, -1]], np.int8)
    assert ternary_linear(x, w, f32(0.5), 8).tolist() == [[95.5, -32.5]]


def test_int8_linear_by_hand() -> None:
    x = np.array([[127.0, -1.0]], f32)
    w = np.array([[127, 1], [0, -127]], np.int8)
    got = int8_linear(x, w, np.array([2.0, 0.5], f32))
    assert got.tolist() == [[2.0 * (127 * 127 - 1), 0.5 * 127]]


def test_int8_sums_beyond_2_to_24_round_to_even() -> None:
    n = 2049  # 2049 * 127 * 127 = 33048321 needs 25 bits
    x = np.full((1, n), 127.0, f32)
    got = int8_linear(x, np.full((1, n), 127, np.int8), np.ones(1, f32))
    assert int(got[0, 0]) == 33048320


def test_float_linear_uses_the_tree() -> None:
    x, w = np.ones((1, 4), f32), np.array([[1e8, 1.0, -1e8, 1.0]], f32)
    assert float_linear(x, w).tolist() == [[2.0]]


def test_packing_by_hand() -> None:
    w = np.zeros((1, 256), np.int8)
    w[0, [0, 64, 128, 192]] = [1, -1, 0, 1]  # codes 2, 0, 1, 2
    packed = pack_ternary(w)
    assert packed.shape == (1, 64)
    assert packed[0, 0] == 0b10_01_00_10
    assert (packed[0, 1:] == 0b01_01_01_01).all()


@pytest.mark.parametrize("width", [1, 48, 255, 256, 257, 700])
def test_packing_round_trip(width: int) -> None:
    codes = np.random.default_rng(width).integers(-1, 2, (5, width)).astype(np.int8)
    packed = pack_ternary(codes)
    assert packed.shape == (5, packed_width(width)) and packed.dtype == np.uint8
    assert (unpack_ternary(packed, width) == codes).all()


def test_code_three_is_refused() -> None:
    packed = pack_ternary(np.zeros((3, 256), np.int8))
    packed[1, 7] |= 0b00_11_00_00
    with pytest.raises(IllegalCodeError, match="byte 71"):
        unpack_ternary(packed, 256)


def test_packing_refuses_other_codes() -> None:
    with pytest.raises(ValueError, match=r"-1\.\.1"):
        pack_ternary(np.array([[2, 0]], np.int8))


def sylvester(n: int) -> np.ndarray:
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_fwht_is_the_sylvester_matrix(n: int) -> None:
    x = np.random.default_rng(n).integers(-50, 50, (3, n)).astype(f32)
    exact = (x @ sylvester(n)).astype(f32) * f32(n**-0.5)  # integers: exact before the scale
    assert (fwht(x) == exact).all()


def test_fwht_twice_is_the_identity() -> None:
    x = np.random.default_rng(0).standard_normal(256).astype(f32)
    np.testing.assert_allclose(fwht(fwht(x)), x, atol=1e-6)


def test_first_output_is_the_tree_sum() -> None:
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(f32)
    assert (fwht(x)[:, 0] == feature_sum(x) * f32(0.125)).all()


def test_rotation_pads_and_fwht_refuses() -> None:
    assert rotate(np.ones(48, f32)).shape == (64,)
    with pytest.raises(ValueError, match="48"):
        fwht(np.ones(48, f32))


# ---- rotation without padding (SPEC 5.3) ----------------------------------------------


def test_rotation_of_three_and_six_by_hand() -> None:
    root = np.sqrt(3)
    table = np.array(
        [[2, 2, 2], [2, root - 1, -root - 1], [2, -root - 1, root - 1]]
    ) / (2 * root)  # fmt: skip
    assert np.allclose(rotate_unpadded(np.eye(3, dtype=f32)), table, atol=1e-7)
    both = np.kron(table, np.array([[1, 1], [1, -1]]) / np.sqrt(2))
    assert np.allclose(rotate_unpadded(np.eye(6, dtype=f32)), both, atol=1e-7)


@pytest.mark.parametrize("n", [1, 2, 7, 12, 48, 64, 576, 1536])
def test_rotation_is_orthonormal_symmetric_and_its_own_inverse(n: int) -> None:
    matrix = rotate_unpadded(np.eye(n, dtype=f32)).astype(np.float64)
    assert np.allclose(matrix @ matrix.T, np.eye(n), atol=2e-6)
    assert np.allclose(matrix, matrix.T, atol=2e-7)
    assert np.abs(matrix).max() <= np.sqrt(2 / n) + 1e-7  # nothing stays in one place
    if not n & (n - 1):
        x = np.random.default_rng(n).standard_normal((3, n)).astype(f32)
        assert np.array_equal(rotate_unpadded(x), fwht(x))
