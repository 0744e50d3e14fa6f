"""exp and what is made of it, one float at a time and LANES at a time (SPEC 2.6, 2.7).

LLVM would not use its widest registers for the plain loops, hence the second form; both do the same
operations in the same order. Arguments named `*_at` are addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir

from bitskip_cpu.kernels.arithmetic.lanes import (
    LANE_BYTES,
    LANE_FLOATS,
    LANE_INTS,
    load_lanes,
    splat,
    store_lanes,
)
from bitskip_cpu.kernels.layout import LANES
from bitskip_cpu.kernels.numba_inside.decorators import intrinsic, kernel
from bitskip_cpu.kernels.numba_inside.emit import LONG
from bitskip_cpu.kernels.numba_inside.views import floats
from bitskip_ref import constants

f32, i32 = np.float32, np.int32

ONE = f32(1.0)
# x + 1.5 * 2^23 - 1.5 * 2^23 rounds to nearest, ties to even, for |x| < 2^22 (SPEC 2.5).
ROUNDER = f32(12582912.0)
EXP_MIN, EXP_MAX = f32(constants.EXP_MIN), f32(constants.EXP_MAX)
LOG2_E = f32(constants.LOG2_E)
LN2_HIGH, LN2_LOW = f32(constants.LN2_HIGH), f32(constants.LN2_LOW)
E0, E1, E2, E3, E4, E5 = map(f32, constants.EXP_COEFFICIENTS)
BIAS, MANTISSA = i32(127), i32(23)


@kernel
def exp(x):
    """SPEC 2.6, of one float32; a NaN stays one (SPEC 9.5)."""
    x = EXP_MIN if x < EXP_MIN else x
    x = EXP_MAX if x > EXP_MAX else x
    k = (x * LOG2_E + ROUNDER) - ROUNDER
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    p = ((((E0 * r + E1) * r + E2) * r + E3) * r + E4) * r + E5
    power = i32((i32(k) + BIAS) << MANTISSA).view(f32)
    return ((p * (r * r) + r) + ONE) * power


Vectors = list[ir.Value]
AT_ONCE = 4  # vectors whose steps take turns: each is a chain, and a CPU sees only so far ahead


def _constant(value: np.float32 | np.int32, kind: ir.VectorType = LANE_FLOATS) -> ir.Constant:
    return ir.Constant(kind, [value.item()] * LANES)


def exp_of(builder: ir.IRBuilder, x: Vectors) -> Vectors:
    """`exp` of vectors, an operation on all before the next."""

    def each(operation: Callable[..., ir.Value], *operands: Vectors | ir.Value) -> Vectors:
        lists = [o if isinstance(o, list) else [o] * len(x) for o in operands]
        return [operation(*values) for values in zip(*lists, strict=True)]

    def bounded(order: str, value: ir.Value, bound: ir.Value) -> ir.Value:
        return builder.select(builder.fcmp_ordered(order, value, bound), bound, value)

    mul, add, sub = (partial(each, f) for f in (builder.fmul, builder.fadd, builder.fsub))
    x = each(partial(bounded, "<"), x, _constant(EXP_MIN))
    x = each(partial(bounded, ">"), x, _constant(EXP_MAX))
    k = sub(add(mul(x, _constant(LOG2_E)), _constant(ROUNDER)), _constant(ROUNDER))
    r = sub(x, mul(k, _constant(LN2_HIGH)))
    r = sub(r, mul(k, _constant(LN2_LOW)))
    p = [_constant(E0)] * len(x)
    for factor in (E1, E2, E3, E4, E5):
        p = add(mul(p, r), _constant(factor))
    bias, mantissa = _constant(BIAS, LANE_INTS), _constant(MANTISSA, LANE_INTS)
    exponent = each(lambda v: builder.add(builder.fptosi(v, LANE_INTS), bias), k)
    power = each(lambda v: builder.bitcast(builder.shl(v, mantissa), LANE_FLOATS), exponent)
    return mul(add(add(mul(p, mul(r, r)), r), _constant(ONE)), power)


def _vectors(builder: ir.IRBuilder, at: ir.Value, count: int) -> Vectors:
    return [load_lanes(builder, builder.add(at, LONG(i * LANE_BYTES))) for i in range(count)]


def _store(builder: ir.IRBuilder, vectors: Vectors, at: ir.Value) -> None:
    for i, vector in enumerate(vectors):
        store_lanes(builder, vector, builder.add(at, LONG(i * LANE_BYTES)))


def _exp_lanes(count: int) -> Callable[..., None]:
    """(x, top, out): out = exp(x - top) of `count` vectors."""

    def twin(x_at: int, top: Any, out_at: int) -> None:
        n = count * LANES
        floats(out_at, n)[:] = [exp(x - top) for x in floats(x_at, n)]

    @intrinsic(twin, top="float32")
    def exp_lanes(builder, x_at, top, out_at):
        top = splat(builder, top)
        x = [builder.fsub(v, top) for v in _vectors(builder, x_at, count)]
        _store(builder, exp_of(builder, x), out_at)

    return exp_lanes


def _silu_lanes(count: int) -> Callable[..., None]:
    """(gate, up, out): out = silu(gate) * up of `count` vectors."""

    def twin(gate_at: int, up_at: int, out_at: int) -> None:
        n = count * LANES
        pairs = zip(floats(gate_at, n), floats(up_at, n), strict=True)
        floats(out_at, n)[:] = [(g / (ONE + exp(-g))) * u for g, u in pairs]

    @intrinsic(twin)
    def silu_lanes(builder, gate_at, up_at, out_at):
        gates, ups = (_vectors(builder, at, count) for at in (gate_at, up_at))
        products = []
        below = exp_of(builder, [builder.fneg(gate) for gate in gates])
        for gate, up, e in zip(gates, ups, below, strict=True):
            silu = builder.fdiv(gate, builder.fadd(_constant(ONE), e))
            products.append(builder.fmul(silu, up))
        _store(builder, products, out_at)

    return silu_lanes


exp_vectors, exp_vector = _exp_lanes(AT_ONCE), _exp_lanes(1)
silu_vectors, silu_vector = _silu_lanes(AT_ONCE), _silu_lanes(1)


@kernel
def exp_differences(x_at, top, out_at, n):
    """out = exp(x - top)."""
    most, whole = n // (AT_ONCE * LANES) * AT_ONCE * LANES, n // LANES * LANES
    for i in range(0, most, AT_ONCE * LANES):
        exp_vectors(x_at + 4 * i, top, out_at + 4 * i)
    for i in range(most, whole, LANES):
        exp_vector(x_at + 4 * i, top, out_at + 4 * i)
    x, out = floats(x_at, n), floats(out_at, n)
    for i in range(whole, n):
        out[i] = exp(x[i] - top)


@kernel
def silu_products(gate_at, up_at, out_at, n):
    """out = silu(gate) * up (SPEC 7.1)."""
    most, whole = n // (AT_ONCE * LANES) * AT_ONCE * LANES, n // LANES * LANES
    for i in range(0, most, AT_ONCE * LANES):
        silu_vectors(gate_at + 4 * i, up_at + 4 * i, out_at + 4 * i)
    for i in range(most, whole, LANES):
        silu_vector(gate_at + 4 * i, up_at + 4 * i, out_at + 4 * i)
    gate, up, out = floats(gate_at, n), floats(up_at, n), floats(out_at, n)
    for i in range(whole, n):
        out[i] = (gate[i] / (ONE + exp(-gate[i]))) * up[i]
