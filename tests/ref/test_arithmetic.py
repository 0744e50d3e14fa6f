"""Sums, functions, norms and RoPE against hand-written values and laws."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bitskip_ref.arithmetic import functions
from bitskip_ref.arithmetic.confidence import confidence
from bitskip_ref.arithmetic.norms import layer_norm, rms_norm
from bitskip_ref.arithmetic.rope import apply_rope
from bitskip_ref.arithmetic.sums import feature_sum, mean, position_sum
from bitskip_ref.config import preset, small_twin
from bitskip_ref.rope import rope_table

f32 = np.float32


def bits(x: np.ndarray) -> np.ndarray:
    return np.atleast_1d(np.asarray(x, f32)).view(np.uint32)


def test_feature_sum_pairs_halves() -> None:
    # 1 + 1e8 loses the 1 in float32; the order decides what is left.
    x = np.array([1e8, 1.0, -1e8, 1.0], f32)
    assert feature_sum(x) == f32(2.0)  # (1e8 - 1e8) + (1 + 1)
    assert position_sum(x) == f32(0.0)  # (1e8 + 1) + (-1e8 + 1)


def test_three_values_are_padded_to_four() -> None:
    assert feature_sum(np.array([1e8, 1.0, -1e8], f32)) == f32(1.0)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13])
def test_padding_never_shows(n: int) -> None:
    x = np.random.default_rng(n).standard_normal(n).astype(f32)
    longer = np.concatenate([x, np.zeros(19, f32)])
    assert (bits(feature_sum(x)) == bits(feature_sum(longer))).all()
    assert (bits(position_sum(x)) == bits(position_sum(longer))).all()


def test_position_sum_has_no_negative_zero() -> None:
    assert bits(position_sum(np.array([-0.0], f32)))[0] == 0


def test_mean_divides_by_the_unpadded_count() -> None:
    assert mean(np.array([1, 2, 6], f32)) == f32(3.0)


def test_exp_at_known_points() -> None:
    assert functions.exp(np.array([0.0, -0.0], f32)).tolist() == [1.0, 1.0]
    assert functions.exp(f32(1.0)) == f32(math.e)
    assert functions.exp(f32(-1000.0)) == functions.exp(f32(-87.0)) > 0
    assert np.isfinite(functions.exp(f32(1000.0)))


def test_exp_is_within_its_bound() -> None:
    x = np.linspace(-87, 88, 400_001).astype(f32)
    true = np.exp(x.astype(np.float64))
    assert np.abs(functions.exp(x) / true - 1).max() < 1.2e-7


def test_exp_bits_do_not_change() -> None:
    got = bits(functions.exp(np.array([-3.3, 0.1, 7.7], f32)))
    true = np.exp(np.array([-3.3, 0.1, 7.7], f32).astype(np.float64)).astype(f32)
    assert np.abs(got.astype(np.int64) - bits(true)).max() <= 1


def test_log_is_within_its_bound() -> None:
    x = np.concatenate([np.geomspace(1.2e-38, 3.3e38, 200_001), np.linspace(0.7, 1.45, 200_001)])
    x = x.astype(f32)
    true = np.log(x.astype(np.float64))
    assert (np.abs(functions.log(x) - true) / np.maximum(1, np.abs(true))).max() < 1.2e-7
    assert bits(functions.log(f32(1.0)))[0] == 0


def test_log_bits_do_not_change() -> None:
    x = np.array([0.5, 2, 3, 50257, 1e-3], f32)
    expected = [0xBF317218, 0x3F317218, 0x3F8C9F54, 0x412D32D0, 0xC0DD0C55]
    assert bits(functions.log(x)).tolist() == expected


def test_confidence_by_hand() -> None:
    values = confidence(np.log(np.array([0.5, 0.25, 0.125, 0.125], f32)))
    assert values == {"max": 0.5, "margin": 0.25, "entropy": 0.125}  # H = 1.75 bits of 2
    assert confidence(np.full(50, 3.5, f32)) == {"max": f32(1 / 50), "margin": 0, "entropy": 0}
    assert confidence(np.array([7.0], f32)) == {"max": 1, "margin": 1, "entropy": 1}
    assert confidence(np.array([9e4, 0.0], f32)) == {"max": 1, "margin": 1, "entropy": 1}


@pytest.mark.parametrize("scale", [0.1, 3, 20])
@pytest.mark.parametrize("size", [2, 97, 5000])
def test_confidence_in_binary64(size: int, scale: float) -> None:
    z = (np.random.default_rng(0).standard_normal(size) * scale).astype(f32)
    p = np.exp(z.astype(np.float64) - z.max())
    p = np.sort(p / p.sum())
    entropy = 1 + (p[p > 0] * np.log(p[p > 0])).sum() / np.log(size)
    got = confidence(z)
    assert all(type(value) is f32 for value in got.values())
    np.testing.assert_allclose(list(got.values()), [p[-1], p[-1] - p[-2], entropy], atol=1e-6)


def test_sigmoid_silu_relu() -> None:
    assert functions.sigmoid(f32(0.0)) == f32(0.5)
    assert functions.silu(f32(0.0)) == f32(0.0)
    x = np.array([-2.0, -0.0, 3.0], f32)
    assert bits(functions.relu(x)).tolist() == bits(np.array([0, 0, 3], f32)).tolist()
    assert functions.relu2(x).tolist() == [0.0, 0.0, 9.0]


def test_rms_norm_by_hand() -> None:
    got = rms_norm(np.array([3, -4, 0, 0], f32), np.array([1, 2, 1, 1], f32), 1e-12)
    np.testing.assert_allclose(got, [1.2, -3.2, 0, 0], rtol=1e-6)


def test_layer_norm_by_hand() -> None:
    one = np.ones(4, f32)
    got = layer_norm(np.array([1, 3, 1, 3], f32), one, f32(0.5) * one, 1e-12)
    np.testing.assert_allclose(got, [-0.5, 1.5, -0.5, 1.5], rtol=1e-6)


def test_layer_norm_ignores_a_shift() -> None:
    x = np.array([1, 2, 3, 10], f32)
    one, zero = np.ones(4, f32), np.zeros(4, f32)
    shifted = layer_norm(x + f32(16), one, zero, 1e-5)
    np.testing.assert_allclose(layer_norm(x, one, zero, 1e-5), shifted, rtol=1e-5)


@pytest.mark.parametrize("name", ["bitskip-v1", "bitnet-2b4t"])
def test_rope_table_is_cosine_and_sine(name: str) -> None:
    config = preset(name)
    cos, sin = rope_table(config)
    i = np.arange(config.head_dim // 2)
    angle = np.arange(len(cos))[:, None] * config.rope_theta ** (-2 * i / config.head_dim)
    assert cos.dtype == sin.dtype == f32
    assert np.abs(cos - np.cos(angle)).max() < 1e-7
    assert np.abs(sin - np.sin(angle)).max() < 1e-7


def test_rope_turns_pairs_half_a_head_apart() -> None:
    x = np.arange(1, 5, dtype=f32).reshape(1, 1, 4)
    quarter = np.array([[0.0, 1.0]], f32), np.array([[1.0, 0.0]], f32)  # 90 and 0 degrees
    assert apply_rope(x, *quarter).ravel().tolist() == [-3.0, 2.0, 1.0, 4.0]


def test_rope_products_depend_on_distance_alone() -> None:
    config = small_twin("bitskip-v1")
    cos, sin = rope_table(config)
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 1, config.head_dim)).astype(f32)

    def product(i: int, j: int) -> float:
        a = apply_rope(q, cos[i : i + 1], sin[i : i + 1])
        return float(np.sum(a * apply_rope(k, cos[j : j + 1], sin[j : j + 1])))

    assert product(7, 3) == pytest.approx(product(37, 33), abs=1e-5)


def test_half_by_hand() -> None:
    """SPEC 6.5: ties to even, subnormals kept, nothing infinite."""
    pairs = {
        1.0: 1.0, 1 + 2**-11: 1.0, 1 + 3 * 2**-11: 1 + 2**-9, 1 + 2**-11 + 2**-20: 1 + 2**-10,
        2048.0: 2048.0, 2049.0: 2048.0, 2051.0: 2052.0,
        2**-24: 2**-24, 2**-25: 0.0, 3 * 2**-25: 2**-23, 2**-14 - 2**-25: 2**-14, 1e-9: 0.0,
        65504.0: 65504.0, 65519.0: 65504.0, 65520.0: 65504.0, 1e30: 65504.0,
    }  # fmt: skip
    for sign in (1, -1):
        found = functions.half(np.array([sign * x for x in pairs], f32))
        assert found.dtype == np.float16
        equal = np.array([sign * y for y in pairs.values()], np.float16)
        assert found.tobytes() == equal.tobytes()  # with the signs of zeros
