"""float16 and back, bfloat16 to float32: exact, and the same on every CPU (SPEC 6.5, 4.5)."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir

from bitskip_cpu import isa
from bitskip_cpu.kernels.arithmetic.lanes import LANE_FLOATS, LANE_INTS
from bitskip_cpu.kernels.layout import LANES
from bitskip_cpu.kernels.numba_inside.decorators import kernel
from bitskip_cpu.kernels.numba_inside.emit import WORD, pointer
from bitskip_cpu.kernels.numba_inside.views import float16s, floats, int32s
from bitskip_ref.constants import LARGEST_HALF

f32, i32, u16 = np.float32, np.int32, np.uint16

EXPONENT_SHIFT = f32(2.0**112)  # moves float16's exponent to float32's
MAGNITUDE, SIGN = i32(0x7FFFFFFF), i32(0x8000)
LARGEST = f32(LARGEST_HALF).view(i32)  # its bits
LEAST_NORMAL = i32(0x38800000)  # of 2^-14
SUBNORMAL_ROUNDER = f32(0.5)  # whose last bit is float16's least subnormal
SUBNORMAL_BITS = i32(0x3F000000)  # its bits
INFINITY_BITS, QUIET_NAN = i32(0x7F800000), i32(0x7E00)  # of a float32; of a float16
LARGEST_BITS = 0x7BFF  # of a float16 that is a finite number
REBASE = i32(112 << 10)


@kernel
def float16_bits(x):
    """SPEC 6.5, of one float32: bits of the float16; a NaN stays one (SPEC 9.5)."""
    bits = f32(x).view(i32)
    magnitude = i32(bits & MAGNITUDE)  # floats without a sign order as their bits do
    m = min(magnitude, LARGEST)
    odd = i32(i32(m >> i32(13)) & i32(1))
    normal = i32(i32(i32(m + i32(0xFFF)) + odd) >> i32(13)) - REBASE
    rounded = f32(i32(m).view(f32) + SUBNORMAL_ROUNDER)  # the addition rounds
    subnormal = rounded.view(i32) - SUBNORMAL_BITS
    code = subnormal if m < LEAST_NORMAL else normal
    code = QUIET_NAN if magnitude > INFINITY_BITS else code
    return u16(i32(i32(bits >> i32(16)) & SIGN) | i32(code))


@kernel
def narrow(source_at, target_at, n):
    """n float32 -> float16 bits."""
    source, target = floats(source_at, n), float16s(target_at, n)
    for i in range(n):
        target[i] = float16_bits(source[i])


@kernel
def widen(source_at, target_at, n):
    """float16 bits -> float32, subnormals included; finite values only."""
    source, target = float16s(source_at, n), int32s(target_at, n)
    for i in range(n):
        h = i32(source[i])
        target[i] = i32((h & i32(0x7FFF)) << i32(13)) | i32((h & i32(0x8000)) << i32(16))
    x = floats(target_at, n)
    for i in range(n):
        x[i] = x[i] * EXPONENT_SHIFT


@kernel
def widen_bfloat16(source_at, target_at, n):
    """bfloat16 bits, the upper half of a float32's -> float32."""
    source, target = float16s(source_at, n), int32s(target_at, n)
    for i in range(n):
        target[i] = i32(source[i]) << i32(16)


def load_float16s(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """Load the LANES float16 there, finite or NaN, as a vector of float32.

    One instruction where the CPU has it; elsewhere LLVM would call a function for each number.
    """
    if isa.converts_float16():
        kind = ir.VectorType(ir.HalfType(), LANES)
        found = builder.load(pointer(builder, address, kind), align=2)
        return builder.fpext(found, LANE_FLOATS)

    def number(value: Any) -> ir.Constant:
        return ir.Constant(LANE_INTS, [value] * LANES)

    kind = ir.VectorType(WORD, LANES)
    bits = builder.zext(builder.load(pointer(builder, address, kind), align=2), LANE_INTS)
    magnitude = builder.and_(bits, number(0x7FFF))
    moved = builder.shl(magnitude, number(13))
    sign = builder.shl(builder.and_(bits, number(0x8000)), number(16))
    x = builder.bitcast(builder.or_(moved, sign), LANE_FLOATS)
    x = builder.fmul(x, ir.Constant(LANE_FLOATS, [float(EXPONENT_SHIFT)] * LANES))
    finite = builder.icmp_unsigned("<=", magnitude, number(LARGEST_BITS))
    return builder.select(finite, x, ir.Constant(LANE_FLOATS, [float("nan")] * LANES))
