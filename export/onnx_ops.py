"""The stated arithmetic as ONNX nodes: each function is a rule of docs/SPEC.md.

ONNX Runtime rewrites graphs as it loads them, and some rewrites change bits. What looks roundabout
below is there so that none of them applies, at any optimization level; the comments name them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bitskip_export.onnx_builder import Dim, GraphBuilder, value_info
from bitskip_ref import constants
from bitskip_ref.config import odd_part
from bitskip_ref.hartley import hartley

f32 = np.float32


# ---- sums (SPEC 2.2 to 2.4) -----------------------------------------------------------


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def pad_features(
    g: GraphBuilder, x: str, width: int, padded: int, lead: Sequence[Dim] = ("T",)
) -> str:
    """Zeros after the features: x [*lead, width] -> [*lead, padded]."""
    if padded == width:
        return x
    x = g.pad(x, -1, g.const(np.array([0, padded - width])))
    g.describe(x, f32, [*lead, padded])
    return x


def halving_sum(g: GraphBuilder, x: str, n: int, axis: int) -> str:
    """SPEC 2.2 over an axis whose length n is a power of two; it keeps length 1."""
    while n > 1:
        n //= 2
        x = g.op("Add", *g.halves(x, axis))
    return x


def feature_sum(g: GraphBuilder, x: str, width: int, lead: Sequence[Dim] = ("T",)) -> str:
    """SPEC 2.2: x [*lead, width] -> [*lead, 1]."""
    n = power_of_two(width)
    return halving_sum(g, pad_features(g, x, width, n, lead), n, axis=-1)


def leading_sum(g: GraphBuilder, x: str, width: int) -> str:
    """SPEC 2.2 over the first axis: x [width, ...] -> [1, ...]."""
    n = power_of_two(width)
    if n > width:
        x = g.pad(x, 0, g.const(np.array([0, n - width])))
    return halving_sum(g, x, n, axis=0)


def mean(g: GraphBuilder, x: str, width: int, lead: Sequence[Dim] = ("T",)) -> str:
    """SPEC 2.4: x [*lead, width] -> [*lead, 1]."""
    return g.op("Div", feature_sum(g, x, width, lead), g.const(f32(width)))


def neighbour_sum(g: GraphBuilder, x: str, width: int, levels: int, count: Dim) -> str:
    """`levels` levels of SPEC 2.3: x [T, count, width] -> [T, count / 2^levels, width]."""
    for level in range(levels):
        x = g.reshape(x, 0, -1, 2 * width)
        half = 2 << level
        middle = count // half if isinstance(count, int) else f"{count}/{half}"
        g.describe(x, f32, ["T", middle, 2 * width])
        x = g.op("Add", *g.halves(x, axis=2))
    return x


# ---- functions (SPEC 2.6 to 2.8, 6.5) -------------------------------------------------


def exp(g: GraphBuilder, x: str) -> str:
    """SPEC 2.6; ORT's own Exp has other bits."""
    least, most = -126, 127  # k over the clamped range
    powers = np.ldexp(f32(1.0), np.arange(least, most + 1))
    x = g.op("Clip", x, g.const(f32(constants.EXP_MIN)), g.const(f32(constants.EXP_MAX)))
    k = g.op("Round", g.op("Mul", x, g.const(f32(constants.LOG2_E))))
    r = g.op("Sub", x, g.op("Mul", k, g.const(f32(constants.LN2_HIGH))))
    r = g.op("Sub", r, g.op("Mul", k, g.const(f32(constants.LN2_LOW))))
    first, *rest = map(f32, constants.EXP_COEFFICIENTS)
    p = g.const(first)
    for c in rest:
        p = g.op("Add", g.op("Mul", p, r), g.const(c))
    y = g.op("Add", g.op("Mul", p, g.op("Mul", r, r)), r)
    y = g.op("Add", y, g.const(f32(1.0)))
    index = g.cast(g.op("Add", k, g.const(f32(-least))), np.int32)
    return g.op("Mul", y, g.op("Gather", g.const(powers), index))


def silu(g: GraphBuilder, x: str) -> str:
    """SPEC 2.7."""
    return g.op("Div", x, g.op("Add", exp(g, g.op("Neg", x)), g.const(f32(1.0))))


def relu2(g: GraphBuilder, x: str) -> str:
    """SPEC 2.8; the square hides the sign that Relu may give a zero."""
    r = g.op("Relu", x)
    return g.op("Mul", r, r)


def half(g: GraphBuilder, x: str) -> str:
    """SPEC 6.5: f32 -> what a float16 cache holds of it."""
    largest = f32(constants.LARGEST_HALF)
    x = g.op("Clip", x, g.const(-largest), g.const(largest))
    return g.cast(x, np.float16)


# ---- norms (SPEC 3) -------------------------------------------------------------------


def norm(
    g: GraphBuilder, x: str, weight: np.ndarray, bias: np.ndarray | None, eps: float,
    lead: Sequence[Dim] = ("T",),
) -> str:  # fmt: skip
    """RMS norm, or layer norm where there is a bias: x [*lead, n] -> [*lead, n]."""
    n = weight.size
    if bias is not None:
        x = g.op("Sub", x, mean(g, x, n, lead))
    variance = g.op("Add", mean(g, g.op("Mul", x, x), n, lead), g.const(f32(eps)))
    # By way of binary64, then rounded: the same bits as sqrt and 1 / sqrt in binary32, whatever the
    # build's square root does, and out of reach of DivMulFusion (x * (1 / s) -> x / s).
    root = g.cast(g.op("Sqrt", g.cast(variance, np.float64)), f32)
    inverse = g.op("Div", g.const(np.float64(1.0)), g.cast(root, np.float64))
    y = g.op("Mul", g.op("Mul", x, g.cast(inverse, f32)), g.const(weight))
    return y if bias is None else g.op("Add", y, g.const(bias))


# ---- linear layers (SPEC 4) -----------------------------------------------------------


def quantize(g: GraphBuilder, x: str, bits: int) -> tuple[str, str]:
    """SPEC 4.2: x [T, n] -> (codes as f32 [T, n], step f32 [T, 1])."""
    largest = g.const(f32(2 ** (bits - 1) - 1))
    s = g.op("ReduceMax", g.op("Abs", x), g.const(np.array([-1])), keepdims=1)
    s = g.op("Max", s, g.const(f32(constants.SCALE_FLOOR)))
    codes = g.op("Round", g.op("Mul", x, g.op("Div", largest, s)))
    return codes, g.op("Div", s, largest)


def ternary_linear(
    g: GraphBuilder, name: str, quantized: tuple[str, str], codes: np.ndarray, alpha: np.ndarray
) -> str:
    """SPEC 4.3. quantized [T, in], codes int8 [out, in], alpha f32 [1] -> [T, out].

    Activations enter as uint8 around 128: 8-bit kernels are fast for uint8 x int8, and a product
    with a ternary weight cannot saturate their 16-bit pair sums. The 128 is taken off in a Sub and
    not as a zero point: Cast(MatMulInteger) * (Mul) would be fused to MatMulIntegerToFloat, which
    takes the first token's step for all.
    """
    x, step = quantized
    unsigned = g.cast(g.op("Add", x, g.const(f32(128.0))), np.uint8)
    weight = g.cast(g.int2_weight(f"{name}.weight", codes.T), np.int8)
    surplus = 128 * codes.sum(axis=1, dtype=np.int32)
    total = g.op("Sub", g.op("MatMulInteger", unsigned, weight), g.const(surplus))
    return g.op("Mul", g.cast(total, f32), g.op("Mul", step, g.const(alpha)))


def int8_linear(g: GraphBuilder, quantized: tuple[str, str], weight: str, scale: str) -> str:
    """SPEC 4.4, 4.8. quantized [T, in], weight int8 [in, out], scale f32 [out] -> [T, out].

    Positive and negative activation codes are multiplied apart, as 7-bit numbers: pairs of
    products of uint8 128..255 with int8 would saturate on CPUs without VNNI.
    """
    codes, step = quantized
    signed = g.op("Concat", codes, g.op("Neg", codes), axis=0)
    parts = g.op("MatMulInteger", g.cast(g.op("Relu", signed), np.uint8), weight)
    total = g.op("Sub", *g.halves(parts, axis=0))
    return g.op("Mul", g.cast(total, f32), g.op("Mul", step, scale))


def float_linear(g: GraphBuilder, x: str, weight: str, shape: tuple[int, int]) -> str:
    """SPEC 4.5 by its sums. x [T, in], weight f32 [in, out] of that shape -> [T, out].

    A Scan over tokens, so that one token's products are held at a time, not all of them.
    """
    width, out = shape
    body = g.child()
    products = body.op("Mul", body.reshape("row", width, 1), weight)
    sums = body.reshape(leading_sum(body, products, width), out)
    inputs = {x: value_info("row", f32, [width])}
    return g.scan(body, inputs, value_info(sums, f32, [out]))


# ---- Hadamard (SPEC 5) ----------------------------------------------------------------


def rotate(g: GraphBuilder, x: str, width: int) -> str:
    """SPEC 5.1, 5.2: x [T, width] -> [T, n], n the next power of two.

    x is seen as [T, high, low]. Butterflies over `high` come first (the larger h); then, after a
    transposition, those over `low`: so every Split and Concat moves long runs.
    """
    n = power_of_two(width)
    high = 1 << (n.bit_length() // 2)
    low = n // high
    x = pad_features(g, x, width, n)
    x = g.reshape(butterflies(g, x, high, low), 0, high, low)
    x = g.op("Transpose", x, perm=[0, 2, 1])
    x = g.reshape(butterflies(g, x, low, high), 0, low, high)
    x = g.reshape(g.op("Transpose", x, perm=[0, 2, 1]), 0, n)
    return g.op("Mul", x, g.const(f32(1.0 / math.sqrt(n))))


def rotate_unpadded(g: GraphBuilder, x: str, width: int) -> str:
    """SPEC 5.3: x [T, width] -> [T, width]."""
    m = odd_part(width)
    n = width // m  # x is seen as [T, m, n]; butterflies of its last axis
    h = n // 2
    while h:
        x = g.reshape(x, 0, width // (2 * h), 2, h)
        a, b = g.halves(x, axis=2)
        x = g.op("Concat", g.op("Add", a, b), g.op("Sub", a, b), axis=2)
        h //= 2
    if m > 1:
        table = hartley(m)
        parts = g.split(g.reshape(x, 0, m, n), 1, [1] * m)  # [T, 1, n] each
        x = ""
        for j, part in enumerate(parts):
            product = g.op("Mul", part, g.const(table[:, j, None]))  # [T, m, n]
            x = g.op("Add", x, product) if x else product
    return g.op("Mul", g.reshape(x, 0, width), g.const(f32(1.0 / math.sqrt(width))))


def butterflies(g: GraphBuilder, x: str, n: int, run: int) -> str:
    """SPEC 5.2 without its scale over the n of x, which holds [T, n, run] in some shape."""
    h = n // 2
    while h:
        x = g.reshape(x, 0, n // (2 * h), 2, h * run)
        a, b = g.halves(x, axis=2)
        x = g.op("Concat", g.op("Add", a, b), g.op("Sub", a, b), axis=2)
        h //= 2
    return x
