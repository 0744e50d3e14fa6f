"""ONNX nodes of single rules against the reference, on values chosen to be awkward."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime as ort
import pytest

from bitskip_export import onnx_ops as ops
from bitskip_export.onnx_attention import attention, positions
from bitskip_export.onnx_builder import GraphBuilder, value_info
from bitskip_ref.arithmetic import functions, hadamard, norms, quant
from bitskip_ref.arithmetic.attention import attention as reference_attention
from bitskip_ref.compare import difference
from tests.helpers import twin

f32 = np.float32
AWKWARD = np.array(
    [0.0, -0.0, 1e-45, -1e-45, 1e-38, 1.0, -1.0, 0.5, 1.5, 2.5, -2.5, 87.0, -87.0, 88.0, -88.0,
     127.0, 1e-5, -1e-5, 3e4, -3e4, 0.34657359, -0.34657359, 0.3465736, 9.9e-6],
    f32,
)  # fmt: skip


def run(x: np.ndarray, build: Callable[[GraphBuilder], str], level: int = 99) -> np.ndarray:
    """What the nodes that `build` adds make of input x."""
    g = GraphBuilder()
    y = build(g)
    inputs = [value_info("x", f32, ["T", *x.shape[1:]])]
    kind = g.op("Identity", y, name="y")
    model = g.model("test", inputs, [value_info(kind, f32, [None] * 2)], {})
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel(level)
    return ort.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})[0]


def values(rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Rows of many magnitudes; the first is awkward, the second zero."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, width)) * 10.0 ** rng.uniform(-8, 4, (rows, 1))
    x[0] = np.resize(AWKWARD, width)
    x[1] = 0.0
    return x.astype(f32)


def equal(expected: np.ndarray, actual: np.ndarray) -> None:
    assert (report := difference("values", expected, actual)) is None, report


def test_exp_and_silu() -> None:
    x = np.concatenate([np.linspace(-100, 100, 20001), AWKWARD]).astype(f32)[None]
    equal(functions.exp(x), run(x, lambda g: ops.exp(g, "x")))
    equal(functions.silu(x), run(x, lambda g: ops.silu(g, "x")))
    equal(functions.relu2(x), run(x, lambda g: ops.relu2(g, "x")))


@pytest.mark.parametrize("level", [0, 1, 2, 3, 99])
@pytest.mark.parametrize("width", [2, 48, 64])
def test_norms(width: int, level: int) -> None:
    """Level 1 and up hold DivMulFusion, which would turn x * (1 / s) into x / s."""
    rng, x = np.random.default_rng(1), values(40, width)
    weight, bias = rng.standard_normal((2, width)).astype(f32)
    bias[0] = 0.0
    expected = norms.rms_norm(x, weight, 1e-5), norms.layer_norm(x, weight, bias, 1e-5)
    for b, y in zip((None, bias), expected, strict=True):
        equal(y, run(x, lambda g, b=b: ops.norm(g, "x", weight, b, 1e-5), level))


@pytest.mark.parametrize("width", [1, 2, 3, 48, 64, 100])
def test_rotation(width: int) -> None:
    x = values(5, width)
    equal(hadamard.rotate(x), run(x, lambda g: ops.rotate(g, "x", width)))


@pytest.mark.parametrize("level", [0, 1, 2, 3, 99])
@pytest.mark.parametrize("bits", [4, 8])
def test_ternary_linear(bits: int, level: int) -> None:
    """Level 2 and up hold MatMulIntegerToFloat, which would use the first row's step for all."""
    codes = np.random.default_rng(2).integers(-1, 2, (33, 48)).astype(np.int8)
    alpha, x = np.array([0.037], f32), values(9, 48)
    expected = quant.ternary_linear(x, codes, alpha[0], bits)
    equal(expected, run(x, lambda g: ops.ternary_linear(
        g, "w", ops.quantize(g, "x", bits), codes, alpha), level))  # fmt: skip


@pytest.mark.parametrize("fill", [127, -127, None])
def test_int8_linear_at_its_largest_sums(fill: int | None) -> None:
    """All codes at the ends: 16-bit pair sums would saturate on CPUs without VNNI."""
    rng = np.random.default_rng(3)
    weight = rng.integers(-127, 128, (40, 64)).astype(np.int8)
    if fill is not None:
        weight[:] = fill
    scale, x = rng.uniform(0.1, 1, 40).astype(f32), values(6, 64)
    x[2], x[3] = 1.0, -1.0
    expected = quant.int8_linear(x, weight, scale)
    equal(expected, run(x, lambda g: ops.int8_linear(
        g, ops.quantize(g, "x", 8), g.weight("w", weight.T), g.const(scale))))  # fmt: skip


@pytest.mark.parametrize("width", [48, 64])
def test_float_linear(width: int) -> None:
    weight = np.random.default_rng(4).standard_normal((40, width)).astype(f32)
    weight[0, :5] = -0.0
    x = values(6, width)
    expected = quant.float_linear(x, weight)
    equal(expected, run(x, lambda g: ops.float_linear(
        g, "x", g.weight("w", weight.T), weight.T.shape)))  # fmt: skip


@pytest.mark.parametrize("head_dim", [12, 16])
@pytest.mark.parametrize("context", [7, 8, 64])
@pytest.mark.parametrize("at_once", [False, True])
def test_attention(head_dim: int, context: int, at_once: bool) -> None:
    """Positions around chunks and up to a full context; some values are -0, whose sum is +0."""
    config = twin("tiny").replace(head_dim=head_dim, max_position_embeddings=context)
    tail = [config.num_key_value_heads, head_dim]
    g = GraphBuilder()
    out = attention(g, config, positions(g, config), "q", "keys", "values", at_once)
    inputs = [value_info("q", f32, ["T", config.num_attention_heads, head_dim])]
    inputs += [
        value_info(name, f32, [n, *tail]) for name, n in (("keys", "S+T"), ("values", "S+T"))
    ]
    inputs += [
        value_info("token_ids", np.int64, ["T"]),
        value_info("past.0.key", f32, ["S", *tail]),
    ]
    g.op("Identity", out, name="y")
    model = g.model("test", inputs, [value_info("y", f32, ["T", config.attention_size])], {})
    session = ort.InferenceSession(model.SerializeToString())
    rng = np.random.default_rng(6)
    for total in (n for n in (1, 2, 3, 7, 8, 9, 17, 31, 32, 33, 63, 64) if n <= context):
        new = int(rng.integers(1, total + 1))
        q = 3 * rng.standard_normal((new, config.num_attention_heads, head_dim), f32)
        keys, values = rng.standard_normal((2, total, *tail), f32)
        values[..., 3:5] = -0.0
        feeds = {"q": q, "keys": keys, "values": values, "token_ids": np.zeros(new, np.int64)}
        actual = session.run(None, feeds | {"past.0.key": keys[: total - new]})[0]
        equal(reference_attention(q, keys, values), actual)
        assert not np.signbit(actual[:, 3:5]).any()


def test_int2_weights_hold_every_code() -> None:
    codes = np.array([[-1, 0, 1], [1, 1, -2], [0, -1, -1]], np.int8)  # a length not divisible by 4
    x = np.eye(3, dtype=f32)
    equal(codes.astype(f32), run(x, lambda g: g.op(
        "MatMul", "x", g.cast(g.int2_weight("w", codes), f32))))  # fmt: skip
