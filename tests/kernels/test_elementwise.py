"""Float kernels: hand vectors, and the bits of plain NumPy in the stated order."""

from __future__ import annotations

import numpy as np
import pytest

from bitskip_cpu.kernels import layout
from bitskip_cpu.kernels.arithmetic import elementwise as kernels
from bitskip_cpu.kernels.arithmetic.exponential import exp_differences
from bitskip_ref.arithmetic.confidence import confidence
from bitskip_ref.arithmetic.functions import exp, log, relu2, sigmoid, silu
from bitskip_ref.arithmetic.hadamard import fwht, rotate_unpadded
from bitskip_ref.arithmetic.norms import layer_norm, rms_norm
from bitskip_ref.arithmetic.quant import quantize_activations
from bitskip_ref.arithmetic.sums import feature_sum
from bitskip_ref.config import odd_part
from bitskip_ref.hartley import hartley
from tests.kernels.calling import call, compiled, same_bits

f32 = np.float32
TINY = np.array([1e-45, -1e-45, 1e-40, -3e-39], f32)  # subnormals


def random(n: int, seed: int = 0) -> np.ndarray:
    """n floats of many magnitudes, both zeros and subnormals among them."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(n) * 2.0 ** rng.integers(-20, 20, n)).astype(f32)
    special = np.concatenate([np.array([0.0, -0.0], f32), TINY])
    x[: n // 3] = rng.choice(special, n // 3)
    return rng.permutation(x)


def test_tree_sum_adds_halves() -> None:
    big = f32(2.0**24)
    x = np.array([big, 1.0, -big, 1.0], f32)
    assert call(kernels.tree_sum, x, 4) == 2.0  # (big - big) + (1 + 1); in sequence it is 1


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 48, 64, 100, 257, 2048])
def test_dot_tree(n: int) -> None:
    x, w, scratch = random(n), random(n, 1), np.full(4096, 7, f32)
    assert same_bits(feature_sum(x * w), f32(call(kernels.dot_tree, x, w, n, scratch)))
    x[:] = -0.0
    assert same_bits(feature_sum(x * abs(w)), f32(call(kernels.dot_tree, x, abs(w), n, scratch)))


def test_exp() -> None:
    x = np.concatenate([
        np.array([0.0, -0.0, 1.0, -87.0, 88.0, -1e30, 1e30, np.inf, -np.inf], f32), TINY,
        np.linspace(-90, 90, 20001, dtype=f32), random(999),
    ])  # fmt: skip
    y = np.array([f32(compiled(kernels.exp)(v)) for v in x])
    assert same_bits(exp(x), y)
    assert y[0] == 1.0
    s = np.array([f32(compiled(kernels.sigmoid)(v)) for v in x])
    assert same_bits(sigmoid(x), s)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_exp_of_no_number_is_none() -> None:
    x = random(100)
    x[::7] = np.nan
    assert np.isnan(compiled(kernels.exp)(x[0])) and np.isnan(compiled(kernels.sigmoid)(x[0]))
    out = np.zeros_like(x)
    call(exp_differences, x, f32(0), out, len(x))
    assert np.array_equal(np.isnan(x), np.isnan(out)) and np.isnan(exp(x[:1]))[0]


def test_log() -> None:
    x = np.concatenate([
        np.array([1.0, 2.0, 0.5, 0.707106781, 1.4142135, 3e38, 1.2e-38], f32),
        np.geomspace(1.2e-38, 3e38, 20001).astype(f32), np.linspace(0.7, 1.5, 9999, dtype=f32),
    ])  # fmt: skip
    assert same_bits(log(x), np.array([f32(compiled(kernels.log)(v)) for v in x]))


def test_relu2_has_no_negative_zero() -> None:
    x = np.array([-0.0, 0.0, -3.0, 3.0, 1e-30], f32)
    call(kernels.relu2, x, len(x))
    assert same_bits(np.array([0.0, 0.0, 0.0, 9.0, 0.0], f32), x)


@pytest.mark.parametrize("n", [1, 5, 80, 512])
def test_ffn_activation(n: int) -> None:
    both, out = random(2 * n), np.zeros(n, f32)
    gate, up = both[:n].copy(), both[n:].copy()
    with np.errstate(over="ignore"):
        cases = [
            (layout.SWIGLU, 0, silu(gate) * up), (layout.GATED_RELU2, 0, relu2(gate) * up),
            (layout.RELU2, 0, relu2(gate)), (layout.RELU2, 1, gate),
        ]  # fmt: skip
    for kind, squared, expected in cases:
        call(kernels.ffn_activation, kind, squared, both, out, n)
        assert same_bits(expected, out)


@pytest.mark.parametrize("n", [1, 3, 48, 256, 2560])
def test_norms(n: int) -> None:
    x, weight, bias = random(n), random(n, 1), random(n, 2)
    eps, scratch, y = f32(1e-5), np.full(8192, 7, f32), np.zeros(n, f32)
    call(kernels.rms_norm, x, weight, y, n, eps, scratch)
    assert same_bits(rms_norm(x, weight, 1e-5), y)
    call(kernels.layer_norm, x, np.concatenate([weight, bias]), y, n, eps, scratch)
    assert same_bits(layer_norm(x, weight, bias, 1e-5), y)
    in_place = x.copy()
    call(kernels.layer_norm, in_place, np.concatenate([weight, bias]), in_place, n, eps, scratch)
    assert same_bits(y, in_place)


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048])
def test_fwht(n: int) -> None:
    x = random(n)
    y = x.copy()
    call(kernels.fwht, y, n)
    assert same_bits(fwht(x), y)


@pytest.mark.parametrize("n", [1, 3, 10, 24, 48, 64, 96, 192, 576, 640, 768, 1536, 3 * 1024])
def test_rotate_unpadded(n: int) -> None:
    m, x, scratch = odd_part(n), random(n), np.full(4096, 7, f32)
    y = x.copy()
    call(kernels.rotate_unpadded, y, n, m, hartley(m), scratch)
    assert same_bits(rotate_unpadded(x), y)


def quantize(x: np.ndarray, bits: int, padded: int) -> tuple[np.ndarray, np.float32, int]:
    codes = np.full(padded, 99, np.int8)
    largest = f32(2 ** (bits - 1) - 1)
    step, total = call(kernels.quantize, x, len(x), largest, codes, padded)
    return codes, f32(step), total


def test_quantize_by_hand() -> None:
    ties = np.array([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -0.0, -127.0], f32)
    codes, step, total = quantize(ties, 8, 12)
    assert codes.tolist() == [127, 0, 2, 2, 0, -2, -2, 0, -127, 0, 0, 0]
    assert (step, total) == (1.0, 0)
    codes, step, total = quantize(np.array([7.0, 3.5, -2.5], f32), 4, 3)
    assert (codes.tolist(), step, total) == ([7, 4, -2], 1.0, 9)
    codes, step, total = quantize(np.zeros(5, f32), 8, 8)
    assert (codes.tolist(), step, total) == ([0] * 8, f32(1e-5) / f32(127), 0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("n", [1, 3, 48, 300, 2048])
def test_quantize_as_the_reference(n: int, bits: int) -> None:
    for x in (random(n), random(n) * f32(1e-30), np.resize(TINY, n), np.full(n, 3e38, f32)):
        expected, steps = quantize_activations(x, bits)
        codes, step, total = quantize(x, bits, n + 13)
        assert same_bits(np.append(expected, np.zeros(13, np.int8)), codes)
        assert same_bits(steps[0], step)
        assert total == expected.astype(np.int32).sum()


@pytest.mark.parametrize("z", [
    np.array([3.0], f32), np.array([1.0, 1.0], f32), np.array([0.0, 5.0, 5.0, -2.0, 5.0], f32),
    np.array([9.0, 1.0, 2.0], f32), np.array([1.0, 2.0, 9.0], f32), random(97) / f32(1e4),
    np.full(50, -3.5, f32), np.array([0.0, -500.0, 3e5], f32), random(4096), random(50_257),
    np.random.default_rng(0).standard_normal(50_257, f32) * f32(8),
    np.array([-0.0, 0.0, -0.0], f32),
])  # fmt: skip
def test_confidence(z: np.ndarray) -> None:
    scratch = np.full(call(kernels.power_of_two, len(z)), 7, f32)
    values = call(kernels.confidence, z, len(z), scratch)
    for (name, expected), value in zip(confidence(z).items(), values, strict=True):
        assert same_bits(expected, f32(value)), name
