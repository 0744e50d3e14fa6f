"""Operations on LANES floats at once, where LLVM would not find the vector by itself.

The vectors are LLVM's generic ones, which every target can run; each lane is rounded as SPEC 2.1
says. Arguments named `*_at` are addresses. Interpreted, the same operations are NumPy's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.extending import intrinsic

from bitskip_cpu.kernels.layout import LANES
from bitskip_cpu.kernels.memory import floats, vector_pointer

FLOATS = ir.VectorType(ir.FloatType(), LANES)


def _load(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.load(vector_pointer(builder, address, FLOATS), align=4)


def _store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    builder.store(value, vector_pointer(builder, address, FLOATS), align=4)


def _splat(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    nothing = ir.Constant(FLOATS, ir.Undefined)
    first = builder.insert_element(nothing, value, ir.IntType(32)(0))
    mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(first, nothing, mask)


def _two_products(x: Any, a_at: int, y: Any, b_at: int, out_at: int) -> None:
    """out = x * a + y * b, each of the three operations rounded."""
    floats(out_at, LANES)[:] = x * floats(a_at, LANES) + y * floats(b_at, LANES)


def _add(a_at: int, b_at: int, out_at: int) -> None:
    """out = a + b."""
    floats(out_at, LANES)[:] = floats(a_at, LANES) + floats(b_at, LANES)


def _scale(a_at: int, x: Any, out_at: int) -> None:
    """out = a * x."""
    floats(out_at, LANES)[:] = floats(a_at, LANES) * x


def _larger(a_at: int, b_at: int, out_at: int) -> None:
    """out = the larger of a and b."""
    a, b = floats(a_at, LANES), floats(b_at, LANES)
    floats(out_at, LANES)[:] = np.where(a > b, a, b)


def _butterflies(at: int) -> None:
    """The last steps of SPEC 5.2, within LANES neighbours, in place."""
    x = floats(at, LANES)
    h = LANES // 2
    while h:
        a, b = x.reshape(-1, 2, h).transpose(1, 0, 2)
        x[:] = np.stack([a + b, a - b], axis=1).reshape(-1)
        h //= 2


if config.DISABLE_JIT:
    two_products, add, scale, larger = _two_products, _add, _scale, _larger
    butterflies = _butterflies
else:

    @intrinsic
    def two_products(typing: Any, x: Any, a_at: Any, y: Any, b_at: Any, out_at: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            x, a_at, y, b_at, out_at = args
            left = builder.fmul(_splat(builder, x), _load(builder, a_at))
            right = builder.fmul(_splat(builder, y), _load(builder, b_at))
            _store(builder, builder.fadd(left, right), out_at)
            return context.get_dummy_value()

        number, address = types.float32, types.int64
        return types.void(number, address, number, address, address), codegen

    @intrinsic
    def add(typing: Any, a_at: Any, b_at: Any, out_at: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            a, b = (_load(builder, at) for at in args[:2])
            _store(builder, builder.fadd(a, b), args[2])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    @intrinsic
    def scale(typing: Any, a_at: Any, x: Any, out_at: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            scaled = builder.fmul(_load(builder, args[0]), _splat(builder, args[1]))
            _store(builder, scaled, args[2])
            return context.get_dummy_value()

        return types.void(types.int64, types.float32, types.int64), codegen

    @intrinsic
    def larger(typing: Any, a_at: Any, b_at: Any, out_at: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            a, b = (_load(builder, at) for at in args[:2])
            chosen = builder.select(builder.fcmp_ordered(">", a, b), a, b)
            _store(builder, chosen, args[2])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    @intrinsic
    def butterflies(typing: Any, at: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            x = _load(builder, args[0])
            h = LANES // 2
            while h:
                # Lane i meets lane i ^ h; the upper one of a pair becomes other - itself.
                lanes = ir.VectorType(ir.IntType(32), LANES)
                other = builder.shuffle_vector(
                    x, x, ir.Constant(lanes, [i ^ h for i in range(LANES)])
                )
                signs = ir.Constant(FLOATS, [-1.0 if i & h else 1.0 for i in range(LANES)])
                x = builder.fadd(other, builder.fmul(x, signs))
                h //= 2
            _store(builder, x, args[0])
            return context.get_dummy_value()

        return types.void(types.int64), codegen
