"""Operations on LANES floats at once, where LLVM would not find the vector by itself.

The vectors are LLVM's generic ones, which every target can run; each lane is rounded as SPEC 2.1
says. Arguments named `*_at` are addresses. Interpreted, the same operations are NumPy's.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from bitskip_cpu.isa import INTERPRETED
from bitskip_cpu.kernels.layout import LANES, key_slots
from bitskip_cpu.kernels.numba_inside.views import floats, int32s, vector_pointer

Add = Callable[[Any, Any], Any]
LONG = ir.IntType(64)
FLOATS = ir.VectorType(ir.FloatType(), LANES)
LANE_BYTES = 4 * LANES


def paired(x: Sequence[Any], add: Add = operator.add) -> Any:
    """Sum of neighbours (SPEC 2.3), one branch after the other."""
    half = len(x) // 2
    return x[0] if not half else add(paired(x[:half], add), paired(x[half:], add))


def load_lanes(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """The LANES floats there."""
    return builder.load(vector_pointer(builder, address, FLOATS), align=4)


def store_lanes(builder: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    """LANES floats to there."""
    builder.store(value, vector_pointer(builder, address, FLOATS), align=4)


def load_splat(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """The float there, in every lane."""
    at = builder.inttoptr(address, ir.FloatType().as_pointer())
    return splat(builder, builder.load(at, align=4))


def splat(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """The number in every lane."""
    nothing = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    first = builder.insert_element(nothing, value, ir.IntType(32)(0))
    mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(first, nothing, mask)


def swapped(builder: ir.IRBuilder, x: ir.Value, h: int) -> ir.Value:
    """Lane i ^ h in lane i."""
    lanes = ir.VectorType(ir.IntType(32), LANES)
    return builder.shuffle_vector(x, x, ir.Constant(lanes, [i ^ h for i in range(LANES)]))


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


def _largest(at: int) -> Any:
    """The largest of LANES floats."""
    return floats(at, LANES).max()


def _reverse_64(x_at: int, out_at: int) -> None:
    """64 floats into the order of `key_slots`."""
    floats(out_at, 64)[key_slots(64)] = floats(x_at, 64)


def _scaled_sums(acc_at: int, total: Any, x: Any, out_at: int) -> None:
    """out = f32(acc - total) * x."""
    exact = int32s(acc_at, LANES) - np.int32(total)
    floats(out_at, LANES)[:] = exact.astype(np.float32) * x


def _butterflies(at: int) -> None:
    """The last steps of SPEC 5.2, within LANES neighbours, in place."""
    x = floats(at, LANES)
    h = LANES // 2
    while h:
        a, b = x.reshape(-1, 2, h).transpose(1, 0, 2)
        x[:] = np.stack([a + b, a - b], axis=1).reshape(-1)
        h //= 2


if INTERPRETED:
    add, scale, larger, largest, reverse_64 = _add, _scale, _larger, _largest, _reverse_64
    scaled_sums, butterflies = _scaled_sums, _butterflies
else:

    @intrinsic
    def add(typing: Any, a_at: Any, b_at: Any, out_at: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            a, b = (load_lanes(builder, at) for at in args[:2])
            store_lanes(builder, builder.fadd(a, b), args[2])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    @intrinsic
    def scale(typing: Any, a_at: Any, x: Any, out_at: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            scaled = builder.fmul(load_lanes(builder, args[0]), splat(builder, args[1]))
            store_lanes(builder, scaled, args[2])
            return context.get_dummy_value()

        return types.void(types.int64, types.float32, types.int64), codegen

    @intrinsic
    def larger(typing: Any, a_at: Any, b_at: Any, out_at: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            a, b = (load_lanes(builder, at) for at in args[:2])
            chosen = builder.select(builder.fcmp_ordered(">", a, b), a, b)
            store_lanes(builder, chosen, args[2])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    @intrinsic
    def largest(typing: Any, at: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            x = load_lanes(builder, args[0])
            h = LANES // 2
            while h:
                y = swapped(builder, x, h)
                x = builder.select(builder.fcmp_ordered(">", x, y), x, y)
                h //= 2
            return builder.extract_element(x, ir.IntType(32)(0))

        return types.float32(types.int64), codegen

    @intrinsic
    def reverse_64(typing: Any, x_at: Any, out_at: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            kind, index = ir.VectorType(ir.FloatType(), 64), ir.VectorType(ir.IntType(32), 64)
            x_at, out_at = (vector_pointer(builder, at, kind) for at in args)
            x = builder.load(x_at, align=4)
            order = ir.Constant(index, key_slots(64).tolist())  # its own inverse
            builder.store(builder.shuffle_vector(x, x, order), out_at, align=4)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    @intrinsic
    def scaled_sums(typing: Any, acc_at: Any, total: Any, x: Any, out_at: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            acc_at, total, x, out_at = args
            kind = ir.VectorType(ir.IntType(32), LANES)
            acc = builder.load(vector_pointer(builder, acc_at, kind), align=4)
            exact = builder.sub(acc, splat(builder, total))
            scaled = builder.fmul(builder.sitofp(exact, FLOATS), splat(builder, x))
            store_lanes(builder, scaled, out_at)
            return context.get_dummy_value()

        return types.void(types.int64, types.int32, types.float32, types.int64), codegen

    @intrinsic
    def butterflies(typing: Any, at: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            x = load_lanes(builder, args[0])
            h = LANES // 2
            while h:
                # Lane i meets lane i ^ h; the upper one of a pair becomes other - itself.
                other = swapped(builder, x, h)
                signs = ir.Constant(FLOATS, [-1.0 if i & h else 1.0 for i in range(LANES)])
                x = builder.fadd(other, builder.fmul(x, signs))
                h //= 2
            store_lanes(builder, x, args[0])
            return context.get_dummy_value()

        return types.void(types.int64), codegen
