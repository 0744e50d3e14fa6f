"""exp and what is made of it, one float at a time and LANES at a time (SPEC 2.6, 2.7).

LLVM would not use its widest registers for the plain loops, hence the second form; both do the same
operations in the same order. Arguments named `*_at` are addresses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from bitskip_cpu.isa import INTERPRETED
from bitskip_cpu.kernels.inner import inner
from bitskip_cpu.kernels.lanes import FLOATS, load_lanes, splat, store_lanes
from bitskip_cpu.kernels.layout import LANES
from bitskip_cpu.kernels.memory import floats

f32, i32 = np.float32, np.int32

ONE = f32(1.0)
# x + 1.5 * 2^23 - 1.5 * 2^23 rounds to nearest, ties to even, for |x| < 2^22 (SPEC 2.5).
ROUNDER = f32(12582912.0)
EXP_MIN, EXP_MAX = f32(-87.0), f32(88.0)
LOG2_E, LN2_HIGH, LN2_LOW = f32(1.44269504), f32(0.693359375), f32(-2.12194440e-4)
E0, E1, E2 = f32(1.98756915e-4), f32(1.39819995e-3), f32(8.33345191e-3)
E3, E4, E5 = f32(4.16657959e-2), f32(1.66666655e-1), f32(5.00000012e-1)
BIAS, MANTISSA = i32(127), i32(23)


@inner
def exp(x):
    """SPEC 2.6, of one float32."""
    x = x if x > EXP_MIN else EXP_MIN
    x = x if x < EXP_MAX else EXP_MAX
    k = (x * LOG2_E + ROUNDER) - ROUNDER
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    p = ((((E0 * r + E1) * r + E2) * r + E3) * r + E4) * r + E5
    power = i32((i32(k) + BIAS) << MANTISSA).view(f32)
    return ((p * (r * r) + r) + ONE) * power


@inner
def silu_products(gate_at, up_at, out_at, n):
    """out = silu(gate) * up (SPEC 7.1)."""
    whole = n // LANES * LANES
    for i in range(0, whole, LANES):
        silu_lanes(gate_at + 4 * i, up_at + 4 * i, out_at + 4 * i)
    gate, up, out = floats(gate_at, n), floats(up_at, n), floats(out_at, n)
    for i in range(whole, n):
        out[i] = (gate[i] / (ONE + exp(-gate[i]))) * up[i]


@inner
def exp_differences(x_at, top, out_at, n):
    """out = exp(x - top)."""
    whole = n // LANES * LANES
    for i in range(0, whole, LANES):
        exp_lanes(x_at + 4 * i, top, out_at + 4 * i)
    x, out = floats(x_at, n), floats(out_at, n)
    for i in range(whole, n):
        out[i] = exp(x[i] - top)


INTS = ir.VectorType(ir.IntType(32), LANES)


def _constant(value: np.float32 | np.int32, kind: ir.VectorType = FLOATS) -> ir.Constant:
    return ir.Constant(kind, [value.item()] * LANES)


def _exp(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """`exp` of LANES floats."""
    low, high, rounder = _constant(EXP_MIN), _constant(EXP_MAX), _constant(ROUNDER)
    x = builder.select(builder.fcmp_ordered(">", x, low), x, low)
    x = builder.select(builder.fcmp_ordered("<", x, high), x, high)
    k = builder.fmul(x, _constant(LOG2_E))
    k = builder.fsub(builder.fadd(k, rounder), rounder)
    r = builder.fsub(x, builder.fmul(k, _constant(LN2_HIGH)))
    r = builder.fsub(r, builder.fmul(k, _constant(LN2_LOW)))
    p: ir.Value = _constant(E0)
    for factor in (E1, E2, E3, E4, E5):
        p = builder.fadd(builder.fmul(p, r), _constant(factor))
    exponent = builder.add(builder.fptosi(k, INTS), _constant(BIAS, INTS))
    power = builder.bitcast(builder.shl(exponent, _constant(MANTISSA, INTS)), FLOATS)
    result = builder.fadd(builder.fmul(p, builder.fmul(r, r)), r)
    return builder.fmul(builder.fadd(result, _constant(ONE)), power)


if INTERPRETED:

    def exp_lanes(x_at: int, top: Any, out_at: int) -> None:
        out = floats(out_at, LANES)
        out[:] = [exp(x - top) for x in floats(x_at, LANES)]

    def silu_lanes(gate_at: int, up_at: int, out_at: int) -> None:
        gate, up, out = floats(gate_at, LANES), floats(up_at, LANES), floats(out_at, LANES)
        out[:] = [(g / (ONE + exp(-g))) * u for g, u in zip(gate, up, strict=True)]

else:

    @intrinsic
    def exp_lanes(typing: Any, x_at: Any, top: Any, out_at: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            x_at, top, out_at = args
            x = builder.fsub(load_lanes(builder, x_at), splat(builder, top))
            store_lanes(builder, _exp(builder, x), out_at)
            return context.get_dummy_value()

        return types.void(types.int64, types.float32, types.int64), codegen

    @intrinsic
    def silu_lanes(typing: Any, gate_at: Any, up_at: Any, out_at: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            gate_at, up_at, out_at = args
            gate = load_lanes(builder, gate_at)
            below = builder.fadd(_constant(ONE), _exp(builder, builder.fneg(gate)))
            product = builder.fmul(builder.fdiv(gate, below), load_lanes(builder, up_at))
            store_lanes(builder, product, out_at)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen
